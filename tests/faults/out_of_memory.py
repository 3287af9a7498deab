"""Out of VRAM at every place of ours that touches the device: the run goes on, leaner, to the same video.

The device is the CPU: an operation of PyTorch's raises what a full card does. A place is a line of the pack and the
phase that it is reached in; each is struck once, at its first operation and at one drawn later. Models plan as on a
card for a large video, so that there are leaner plans, and stream through a ring. Reading files is not struck, as it
takes host memory, nor are operations on meta tensors, which take none.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
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
from lowvram_video.vae.files import OpenVae
from lowvram_video.vae.retries import at_work, pieces_fitting
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import decode_in, encode_fitting, retry_ways
from lowvram_video.video.pictures import load_image
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .command import OUR_OWN, PACK
from .files import HEIGHT, Files
from .table import Row

CPU = torch.device("cpu")
WIDTH = 160
SIDE = 64  # of what goes through a VAE in strips
LEVELS = 100  # that a latent's unit is compared in
MOST_PIXELS = 24  # of 255, that tiles of a VAE with random weights may differ by from a whole decoding
# functions below which files are read, or weights held: host memory on a card
HOST = {
    "read", "read_into", "_read", "read_tensor", "load_image", "load_tensors", "open_tokenizer", "state_dict",
    "_unload", "build", "_sections", "noise_levels", "section_noise", "flow_sigmas", "framepack_sigmas",
    "check_sigmas", "_place", "save_section", "_look", "HostCopy", "randn", "to_uint8", "_meta", "bind", "plain",
}  # fmt: skip

HOST_PLACES = {("framepack/run/generation.py", "run")}  # latents of sections are in host memory


class Phase(Progress):
    """The title of the phase that goes on."""

    title = "start"

    def begin(self, title: str) -> None:
        self.title = "denoise" if title.startswith("section") else title.split()[0]


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


class Strike(TorchDispatchMode):
    """Counts operations by their place, or raises at one of them."""

    def __init__(self, phase: Phase, at: int = 0) -> None:
        super().__init__()
        self._phase, self._at, self._count = phase, at, 0
        self.places: dict[tuple[str, str], list[int]] = {}
        self.struck = ""  # where it was

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._count += 1
        if self._at == self._count:
            self.struck = f"{self._phase.title}: {_place(sys._getframe(1))}"
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")
        made = func(*args, **(kwargs or {}))
        if not self._at and _takes_memory(made, args):
            place = _place(sys._getframe(1))
            if place is not None:
                self.places.setdefault((self._phase.title, place), []).append(self._count)
        return made


def _takes_memory(made: Any, given: Sequence[Any]) -> bool:
    """Whether an operation has made a tensor of its own, that is not on meta."""
    if not isinstance(made, Tensor) or made.device.type == "meta":
        return False
    known = {
        each.untyped_storage().data_ptr() for each in given if isinstance(each, Tensor) and each.device == made.device
    }
    return made.untyped_storage().data_ptr() not in known


def _place(frame: FrameType | None) -> str | None:
    """The line of the pack that asked for it; None where a function of `HOST` did."""
    found = None
    while frame is not None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        ours = name.startswith(PACK) and not any(part in name for part in OUR_OWN)
        if ours and (function in HOST or (name[len(PACK) + 1 :], function) in HOST_PLACES):
            return None
        if ours and found is None:
            found = f"{name[len(PACK) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return found


@dataclass(frozen=True)
class Case:
    """A pipeline made anew, what it makes, and its models."""

    name: str
    phase: Phase
    make: Callable[[], Any]
    run: Callable[[Any], Tensor]
    models: Callable[[Any], list[StreamedModel[Any]]]
    seen: list[str] = field(default_factory=list)


def wan_case(files: Files, of_picture: bool = False) -> Case:
    phase, folder = Phase(), files.folder
    model = files.picture_model if of_picture else files.model
    image = folder / "girl.png" if of_picture else None
    request = WanRequest(
        "a red ball", "cats", width=WIDTH, height=HEIGHT, num_frames=5, num_steps=2, seed=1, guidance=4.0, image=image
    )

    def make() -> WanPipeline:
        wan = WanFiles(model, folder / "umt5.safetensors", folder / "vae.safetensors")
        pipeline = WanPipeline(wan, RunSettings(device=CPU), phase, folder / "runs")
        pipeline.high.__class__ = LargeWan
        return pipeline

    def run(pipeline: WanPipeline) -> Tensor:
        made = torch.cat(list(pipeline.generate(request)))
        pipeline.forget()
        return made

    return Case("Wan of a picture" if of_picture else "Wan", phase, make, run, lambda made: [made.high])


def strips_case(files: Files) -> Case:
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
            encoded = encode_fitting(vae, video, Strips(32))
            phase.begin("decode")
            ways = [Strips(32), *retry_ways(vae, Strips(32), (SIDE, SIDE))]
            frames = torch.cat(list(pieces_fitting(ways, partial(_frames, vae, latent), "decoding")))
        return torch.cat([encoded.mul(LEVELS).round().flatten(), frames.flatten()])

    return Case("Wan's VAE in strips", phase, make, run, lambda made: [])


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


def out_of_memory(files: Files, most_places: int | None = None) -> Iterator[Row]:
    """A row for each strike at each place; `most_places` of each family, spread over all."""
    for case in (wan_case(files), wan_case(files, of_picture=True), strips_case(files), framepack_case(files)):
        with torch.inference_mode():
            whole = case.run(case.make())
        counter, pipeline = Strike(case.phase), case.make()
        case.phase.title = "start"
        with torch.inference_mode(), counter:
            assert torch.equal(case.run(pipeline), whole)
        draw, places = random.Random(5), list(counter.places.items())
        step = 1 if most_places is None else max(1, len(places) // most_places)
        for (phase, place), counts in places[::step]:
            for at in sorted({counts[0], draw.choice(counts)}):
                yield _struck(case, whole, f"{phase}: {place}", at)


def _struck(case: Case, whole: Tensor, where: str, at: int) -> Row:
    case.phase.title = "start"
    pipeline = case.make()
    strike = Strike(case.phase, at)
    try:
        with torch.inference_mode(), strike:
            made = case.run(pipeline)
        worst = int((made.int() - whole.int()).abs().max()) if made.shape == whole.shape else 999
        seen = "same bits" if worst == 0 else "same but for tiles" if worst <= MOST_PIXELS else f"other by {worst}"
    except torch.cuda.OutOfMemoryError:
        seen = "ended, said so"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        seen = f"{type(error).__name__}: {str(error)[:80]}"
    left = [model for model in case.models(pipeline) if model.started]
    case.phase.title = "start"
    with torch.inference_mode():
        again = torch.equal(case.run(pipeline), whole)
    if left or not again:
        seen += "; memory not given back" if left else "; the next run is another"
    right = seen in ("same bits", "same but for tiles") and strike.struck == where
    return Row(f"out of VRAM: {case.name}", where, right, seen, {"operation": at, "struck": strike.struck})
