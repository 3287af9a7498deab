"""What runs out of VRAM in `out_of_memory`: every kind of run, whose models plan as on a card for a large video."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lowvram_video.attention.sparse.run import AttentionRun
from lowvram_video.attention.sparse.settings import SparseSettings
from lowvram_video.framepack.footprint import SectionSize
from lowvram_video.framepack.inputs import EncoderFiles, Encoders, Inputs
from lowvram_video.framepack.pipeline import FramePackFiles, FramePackPipeline
from lowvram_video.framepack.request import Sampling
from lowvram_video.framepack.run.host import RunPlaces
from lowvram_video.framepack.run.run import FramePackRun
from lowvram_video.framepack.sections import num_frames
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.framepack.timed_prompts import parse_timed_prompt
from lowvram_video.framepack.vae.decoding import DecodeBudget
from lowvram_video.memory.plan.footprint import Limits, WorkSize
from lowvram_video.memory.plan.plan import MemoryPlan, PlanError, plan_leaner, plan_memory
from lowvram_video.memory.stream.ring import DeviceRing
from lowvram_video.runtime.progress import Progress
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.runtime.streamed import StreamedModel
from lowvram_video.sampling.caching.settings import StepCacheSettings
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.vae.files import OpenVae
from lowvram_video.vae.retries import at_work, pieces_fitting
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import decode_in, encode_fitting, retry_ways
from lowvram_video.video.pictures import load_image
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest, files_of
from lowvram_video.wanvideo.upscale.run import Upscaler
from lowvram_video.wanvideo.upscale.streamed import StreamedUpscaler, upscale_work
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from safetensors.torch import save_file
from torch import Tensor

from ..test_sparse_attention import Sol
from ..tiny import randomize
from ..tiny_flashvsr import CONFIG as UPSCALER
from ..tiny_flashvsr import small_video
from .files import HEIGHT, Files
from .parts import VACE

CPU = torch.device("cpu")
WIDTH = 160
SIDE = 64  # of what goes through a VAE in strips
LEVELS = 100  # that a latent's unit is compared in
SPARSE = SparseSettings(tau=0.5, bound=0.3, dense_percent=0, dense_layers=1, min_tokens=0)
SMALL = 96, 64  # that is upscaled

Entered = Callable[[AbstractContextManager[Any]], AbstractContextManager[Any]]


class Phase(Progress):
    """The title of the phase that goes on."""

    title = "start"

    def begin(self, title: str) -> None:
        self.title = "denoise" if title.startswith("section") else title.split()[0]


@dataclass(frozen=True)
class Case:
    """A pipeline made anew, what it makes, and its models.

    `entered` has operations looked at where they are to be: on this thread, or on another card's.
    """

    name: str
    phase: Phase
    make: Callable[[], Any]
    run: Callable[[Any], Tensor]
    models: Callable[[Any], list[StreamedModel[Any]]]
    entered: Entered = lambda looking: looking
    seen: list[str] = field(default_factory=list)


def cases(files: Files) -> Iterator[Case]:
    """All of them."""
    settings = RunSettings(device=CPU)
    yield wan_case("Wan", files)
    yield wan_case("Wan of a picture", files, files.picture_model, image=files.folder / "girl.png")
    yield strips_case(files, Strips(32))
    yield strips_case(files, Strips(16))
    yield framepack_case(files)
    yield wan_case("Wan, NAG", files, guidance=1.0, nag=NagSettings(4.0))
    yield wan_case("Wan, VACE", files, _vace(files), control=_control(files), reference=files.folder / "girl.png")
    cached = replace(settings, step_cache=StepCacheSettings("first_block", 0.3, 0.0, 1.0))
    yield wan_case("Wan, step cache", files, settings=cached, num_steps=6)
    yield sparse_case(files)
    yield cards_case(files, of_other=False)
    yield cards_case(files, of_other=True)
    yield upscale_case(files)


def believing(kind: type[Any], large: WorkSize, vae_tile: int | None = None) -> type[Any]:
    """A kind of model that plans as for a large video on an unlimited card, and streams through a ring.

    `vae_tile` is that of its plans, where not their own.
    """

    def small(plan: MemoryPlan, work: WorkSize) -> MemoryPlan:
        decode = plan.decode if vae_tile is None else replace(plan.decode, tile=vae_tile)
        return replace(plan, work=work, decode=decode)

    class Large(kind):  # type: ignore[misc]
        def make_plan(self, work: WorkSize, limits: Limits) -> MemoryPlan:
            return small(plan_memory(self.footprint(), large, Limits(1 << 60)), work)

        def _leaner_plan(self) -> MemoryPlan | None:
            try:
                return small(plan_leaner(replace(self.plan, work=large)), self.plan.work)
            except PlanError:
                return None

        def _make_ring(self, plan: MemoryPlan) -> DeviceRing:
            return DeviceRing(plan.blocks.ring_bytes, CPU)

    return Large


LargeWan = believing(StreamedWan, WorkSize(401, 720, 1280), vae_tile=0)
LargeFramePack = believing(StreamedFramePack, SectionSize(num_frames(33), 1280, 1280))
LargeUpscaler = believing(StreamedUpscaler, upscale_work(UPSCALER, 2560, 1536))


# --- Wan -------------------------------------------------------------------------------------------------


def wan_case(
    name: str,
    files: Files,
    model: Path | None = None,
    settings: RunSettings | None = None,
    changed: Callable[[WanPipeline], None] = lambda pipeline: None,
    **values: Any,
) -> Case:
    """A run; `values` are of its request, and `changed` makes another pipeline of it."""
    phase, folder = Phase(), files.folder
    request = WanRequest(
        "a red ball", "cats", width=WIDTH, height=HEIGHT, num_frames=5, num_steps=2, seed=1, guidance=4.0
    )
    request = replace(request, **values)

    def make() -> WanPipeline:
        wan = WanFiles(model or files.model, folder / "umt5.safetensors", folder / "vae.safetensors")
        pipeline = WanPipeline(wan, settings or RunSettings(device=CPU), phase, folder / "runs")
        pipeline.high.__class__ = LargeWan
        changed(pipeline)
        return pipeline

    def run(pipeline: WanPipeline) -> Tensor:
        made = torch.cat(list(pipeline.generate(request)))
        pipeline.forget()
        return made

    return Case(name, phase, make, run, lambda made: [made.high])


def sparse_case(files: Files) -> Case:
    """Self-attention that leaves tokens out, by a kernel that is plain PyTorch."""

    def sparse(pipeline: WanPipeline) -> None:
        model = pipeline.high.model
        watch = AttentionRun(
            model.execution.attention, len(pipeline.high.blocks), pipeline.high.config.num_heads, Sol(), SPARSE
        )
        model.execution = replace(model.execution, watch=watch)

    return wan_case("Wan, sparse attention", files, changed=sparse, height=WIDTH, num_frames=9)


def cards_case(files: Files, of_other: bool) -> Case:
    """Two cards, of which the first or the other one is full."""
    place = _Place()

    class OfCards(LargeWan):  # type: ignore[misc, valid-type]
        def open_beside(self, device: torch.device, between_blocks: Callable[[], None]) -> StreamedWan:
            made = super().open_beside(device, between_blocks)
            made.__class__ = OfCards
            return made  # type: ignore[no-any-return]

        def start_beside(self, first: Any, plan: MemoryPlan) -> None:
            with place.looking():
                super().start_beside(first, plan)

        def _velocity(self, *given: Any) -> Tensor:
            with place.looking():
                return super()._velocity(*given)  # type: ignore[no-any-return]

    def shared(pipeline: WanPipeline) -> None:
        pipeline.high.__class__ = OfCards
        pipeline.high.use_cards((CPU,))

    name = f"Wan on two cards, the {'other' if of_other else 'first'} one full"
    case = wan_case(name, files, changed=shared)
    return replace(case, entered=place.entered) if of_other else case


class _Place(AbstractContextManager["_Place"]):
    """Has operations looked at on another thread than this one."""

    def __init__(self) -> None:
        self._looking: AbstractContextManager[Any] | None = None
        self._thread = threading.current_thread()

    def entered(self, looking: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
        self._looking = looking
        return self

    def looking(self) -> AbstractContextManager[Any]:
        """What another card's pass is run within."""
        looking = self._looking if threading.current_thread() is not self._thread else None
        return looking or nullcontext()

    def __exit__(self, *_: object) -> None:
        self._looking = None


def _vace(files: Files) -> Path:
    path = files.folder / "wan_vace.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in randomize(WanModel(VACE)).state_dict().items()}
    save_file(tensors, path)
    return path


def _control(files: Files) -> Path:
    path = files.folder / "control.mp4"
    with VideoWriter(path, 16) as writer:
        writer.write(small_video(5, WIDTH, HEIGHT))
    return path


# --- the VAE, FramePack, FlashVSR ------------------------------------------------------------------------


def strips_case(files: Files, way: Strips) -> Case:
    """Wan's VAE where whole frames do not fit: a video encoded in strips of rows, and latents decoded so."""
    phase = Phase()
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(1, 3, 5, SIDE, SIDE, generator=generator) * 2 - 1
    latent = torch.randn(1, 16, 2, SIDE // 8, SIDE // 8, generator=generator)

    def make() -> OpenVae:
        return WAN_FORMAT.open_file(files.folder / "vae.safetensors")

    def run(opened: OpenVae) -> Tensor:
        with at_work(lambda: opened.build(torch.float32, CPU)) as vae:
            phase.begin("encode")
            encoded = encode_fitting(vae, video, way)
            phase.begin("decode")
            ways = [way, *retry_ways(vae, way, (SIDE, SIDE))]
            frames = torch.cat(list(pieces_fitting(ways, partial(_frames, vae, latent), "decoding")))
        return torch.cat([encoded.mul(LEVELS).round().flatten(), frames.flatten()])

    return Case(f"Wan's VAE {way}", phase, make, run, lambda made: [])


def _frames(vae: Any, latent: Tensor, way: Any) -> Iterator[Tensor]:
    for piece in decode_in(vae, latent, way):
        yield piece[0].movedim(0, -1).add(1).mul(127.5).round()


class Frames:
    """An output that keeps all that it is given."""

    num_sections = 0

    def __init__(self) -> None:
        self.frames: list[Tensor] = []

    def add(self, frames: Tensor, overlap: int) -> None:
        self.frames.append(frames)

    def begin(self, pieces: Any, still_open: int) -> None:
        raise AssertionError

    def leave(self) -> None: ...
    def finish(self) -> None: ...


def framepack_case(files: Files) -> Case:
    phase, folder, settings = Phase(), files.folder, RunSettings(device=CPU)
    names = ("llava_llama3", "clip_l", "hyvae", "sigclip")
    encoders = Encoders(EncoderFiles(*(folder / f"{name}.safetensors" for name in names)), settings, phase)
    picture = load_image(folder / "girl.png", WIDTH, HEIGHT)
    sampling = Sampling(seconds=0.5, window=2, num_steps=2, seed=1, cache_threshold=None)

    def make() -> FramePackPipeline:
        pipeline = FramePackPipeline(FramePackFiles(files.framepack, folder / "hyvae.safetensors"), settings, phase)
        pipeline.model.__class__ = LargeFramePack
        pipeline._decode_budget = lambda: DecodeBudget(1 << 50, 1 << 50)  # type: ignore[method-assign]
        return pipeline

    def run(pipeline: FramePackPipeline) -> Tensor:
        output = Frames()
        inputs = Inputs(parse_timed_prompt("she stands still", 0.0), (WIDTH, HEIGHT), start=picture)
        encoded = encoders.encode(inputs, pipeline.model.config)
        places = RunPlaces(None, folder, lambda _, __: output)
        with FramePackRun.open(pipeline, sampling, encoded, places) as made:
            made.make()
        return torch.cat(output.frames)

    return Case("FramePack", phase, make, run, lambda made: [made.model])


def upscale_case(files: Files) -> Case:
    """A small video made twice as large, in two windows."""
    phase, source = Phase(), small_video(29, *SMALL)
    flashvsr: UpscaleFiles = files_of(files.folder / "flashvsr" / "FlashVSR1_1.safetensors")
    request = UpscaleRequest(scale=2, seed=1, sparse_ratio=0.1, local_range=1, kept_windows=2)

    def make() -> Upscaler:
        upscaler = Upscaler(flashvsr, RunSettings(device=CPU), phase)
        upscaler.model.__class__ = LargeUpscaler
        return upscaler

    def run(upscaler: Upscaler) -> Tensor:
        return torch.cat(list(upscaler.frames(iter([source]), request, SMALL)))

    return Case("FlashVSR", phase, make, run, lambda made: [made.model])
