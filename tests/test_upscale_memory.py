"""FlashVSR in little memory: what plans say is what is allocated, and running out of it costs time alone."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_video.fused.opaque import OpaqueOps
from lowvram_video.memory.plan.footprint import GIB, Choice, Limits
from lowvram_video.memory.plan.plan import plan_memory
from lowvram_video.memory.stream import pinned as pinned_memory
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer.execution import Execution
from lowvram_video.vae.tiny import TinyVAE
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.embeddings import AxisPositions
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.network.upscaling import UpscalingModel, WindowExtras
from lowvram_video.wanvideo.network.windows import WindowPass
from lowvram_video.wanvideo.upscale import host_windows, stream
from lowvram_video.wanvideo.upscale.decoder import CONDITIONAL, decode_next
from lowvram_video.wanvideo.upscale.decoder_memory import DecoderMemory
from lowvram_video.wanvideo.upscale.frames import coloured, enlarged
from lowvram_video.wanvideo.upscale.host_windows import FIRST_WINDOWS, WindowSize
from lowvram_video.wanvideo.upscale.projection import LowQualityProjection, ProjectionConfig
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest
from lowvram_video.wanvideo.upscale.run import Upscaler
from lowvram_video.wanvideo.upscale.streamed import UpscaleFootprint, upscale_work
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .dry_pass import CountedMemory, DryAttention, assign
from .tiny_flashvsr import save_flashvsr, small_video

CONFIG = WanConfig("t2v", 1536, 8960, 12, 30)
SIZES = {2: (1664, 1024), 4: (3328, 1920)}  # of 832x480, padded
REQUEST = UpscaleRequest(seed=1, sparse_ratio=0.1, local_range=1, kept_windows=2)


def footprint(**how: Any) -> UpscaleFootprint:
    """Of the published model in bf16."""
    network, projection = WanModel(CONFIG, device="meta"), LowQualityProjection(ProjectionConfig(), "meta")
    block = _nbytes(network.blocks[0])
    fixed = _nbytes(network) - CONFIG.num_layers * block + _nbytes(projection) + _nbytes(TinyVAE(CONDITIONAL, "meta"))
    blocks = (block,) * CONFIG.num_layers
    return UpscaleFootprint(
        "FlashVSR", CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_heads, blocks, fixed, decoder=CONDITIONAL, **how
    )


def _nbytes(module: nn.Module) -> int:
    return sum(2 * each.numel() for each in module.state_dict().values())


@pytest.mark.parametrize(("scale", "parks"), [(2, False), (4, True)])
def test_832x480_made_larger_is_planned_in_6_gib(scale: int, parks: bool) -> None:
    budget = int(5.75 * GIB)  # and something over
    plan = plan_memory(footprint(parks_memory=parks), upscale_work(CONFIG, *SIZES[scale]), Limits(budget))
    assert plan.denoise.total <= budget


# --- what is allocated, counted on shapes of full size ---------------------------------------------------------


class DryWindows:
    """`HostWindows` without host memory."""

    def __init__(self, size: WindowSize, num_kept: int) -> None:
        self._size, self._kept = size, num_kept
        whole = torch.empty(size.device_bytes(first=not num_kept), dtype=torch.uint8)
        self._buffers = list(whole.chunk(2)) if num_kept else [whole]
        self._room = size.most + 1 if num_kept else FIRST_WINDOWS

    def open(self, layer: int, num_new: int) -> tuple[Tensor, Tensor]:
        buffer, size = self._buffers[layer % len(self._buffers)], self._size
        count = self._kept + num_new // size.rows
        keys, values = (
            buffer[which * self._room * size.nbytes :][: count * size.nbytes].view(size.dtype).view(-1, size.dim)
            for which in (0, 1)
        )
        return keys, values

    def close(self, layer: int) -> None:
        pass


class DryMasked:
    name = "dry"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return q.new_empty(q.shape)


@pytest.mark.parametrize(("num_kept", "num_latents"), [(0, 6), (3, 2)])
def test_a_pass_takes_what_its_footprint_says(num_kept: int, num_latents: int) -> None:
    config, said = replace(CONFIG, num_layers=1), footprint()
    work = replace(upscale_work(CONFIG, *SIZES[4]), frames=4 * num_latents - 3)
    choice = Choice(32768, 3, False, 0, False)
    with FakeTensorMode(), torch.inference_mode():
        network = UpscalingModel(config, device="cpu", dtype=torch.bfloat16)
        network.execution = Execution(
            torch.bfloat16, DryAttention(), OpaqueOps(), token_chunk=32768, head_groups=3, all_queries=True
        )
        with CountedMemory() as memory:
            windows = DryWindows(said.window_size(work), num_kept)
            added = torch.empty(work.rows, config.dim, dtype=torch.bfloat16)
            state = WindowPass(windows, masked=DryMasked(), additions=(added,))
            extras = WindowExtras(positions=AxisPositions(shift=(0.0, 0.0, 0.0)), window=state)
            text = network.embed_context(torch.empty(1, config.text_tokens, config.text_dim))
            network(torch.empty(1, 16, *work.latent_size), torch.empty(1), text, extras=extras)
    planned = said.pass_bytes(work, choice, Limits(1 << 40)) + said.window_size(work).device_bytes(not num_kept)
    latents = 2 * 4 * 16 * work.latent_positions  # which the plan has in a line of their own
    print(f"{num_latents} latent frames: {memory.peak / GIB:.2f} GiB, planned {(planned + latents) / GIB:.2f}")
    assert 0.9 * (planned + latents) < memory.peak <= 1.02 * (planned + latents)


def test_what_the_projection_saw_last_is_counted_beside_passes_and_decoding() -> None:
    """Of this step and of the one before, which stays until the step is done."""
    width, height = SIZES[4]
    projection = LowQualityProjection(ProjectionConfig(), "meta", torch.bfloat16)
    seen = projection.begin(torch.empty(1, 3, 1, height, width, device="meta"), causal=True)
    nbytes = sum(each.nbytes for each in seen)
    said, work = footprint(parks_memory=True), upscale_work(CONFIG, width, height)
    assert said.projection.seen_bytes(height, width, 2) == nbytes
    for parked in (False, True):
        said = footprint(parks_memory=parked)
        most = said.activation_bytes(work, Choice(256, 12, False, 0, False), Limits(1 << 40))
        beside = 0 if parked else 2 * nbytes
        assert 0 <= most - said.decode_bytes(work) - beside < 1 << 26


def test_projecting_takes_what_its_footprint_says() -> None:
    width, height = SIZES[4]
    projection = LowQualityProjection(ProjectionConfig(), "meta", torch.bfloat16)
    config = projection.config
    with FakeTensorMode(), torch.inference_mode():
        for name, tensor in list(projection.named_parameters()):
            assign(projection, name, torch.empty(tensor.shape, dtype=tensor.dtype))
        clip = torch.empty(1, 3, 4, height, width, dtype=torch.bfloat16)
        seen = projection.begin(clip[:, :, :1], causal=True)
        with CountedMemory() as memory:
            projection(clip, seen, causal=True)
    planned = config.clip_bytes(height, width, 2) + config.seen_bytes(height, width, 2)
    print(f"{memory.peak / GIB:.2f} GiB, planned {planned / GIB:.2f}")
    assert memory.peak <= planned


def test_decoding_takes_what_its_footprint_says() -> None:
    width, height = SIZES[4]
    decoder = TinyVAE(CONDITIONAL, "meta", torch.bfloat16)
    with FakeTensorMode(), torch.inference_mode():
        for name, tensor in list(decoder.named_parameters()):
            assign(decoder, name, torch.empty(tensor.shape, dtype=tensor.dtype))
        small = torch.empty(480, 832, 3, dtype=torch.uint8)
        peaks = {}
        for parked in (False, True):
            remembered = _OffDevice() if parked else {}
            for _ in range(2):
                with CountedMemory() as memory:
                    frame = enlarged(small, (width, height), (width, height)).to(torch.bfloat16)
                    shown = torch.stack([frame] * 4, dim=1)[None]
                    frames = decode_next(decoder, torch.empty(1, 16, height // 8, width // 8), shown, remembered)
                    coloured(frames, shown, "adain", (width, height))
                    del frame, shown, frames
            peaks[parked] = memory.peak + sum(each.nbytes for each in remembered.values())
    for parked, peak in peaks.items():
        planned = footprint(parks_memory=parked).decode_bytes(upscale_work(CONFIG, width, height))
        print(f"parked: {parked}: {peak / GIB:.2f} GiB, planned {planned / GIB:.2f}")
        assert 0.85 * planned < peak <= 1.02 * planned


class _OffDevice(dict[int, Tensor]):
    """What is parked: its bytes are not the device's, a copy that is looked at is."""

    def __init__(self) -> None:
        super().__init__()
        self._like: dict[int, torch.Size] = {}

    def __setitem__(self, place: int, seen: Tensor) -> None:
        self._like[place] = seen.shape

    def get(self, place: int, default: Any = None) -> Any:
        return torch.empty(self._like[place], dtype=torch.bfloat16) if place in self._like else default


# --- running out of it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> UpscaleFiles:
    return save_flashvsr(tmp_path_factory.mktemp("flashvsr"))


def upscaled(files: UpscaleFiles, num_frames: int = 29) -> Tensor:
    frames = Upscaler(files, RunSettings()).frames(iter([small_video(num_frames, 64, 64)]), REQUEST, (64, 64))
    return torch.cat(list(frames))


@pytest.fixture(scope="module")
def undisturbed(files: UpscaleFiles) -> Tensor:
    return upscaled(files)


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module], str, range], list[int]]:
    """Have calls of a method, by their numbers, find the device full; the list grows by one with each call."""

    def replaced(owner: type[nn.Module], name: str, numbers: range) -> list[int]:
        real, calls = getattr(owner, name), []

        def called(self: nn.Module, *args: Any, **named: Any) -> Any:
            calls.append(len(calls))
            if calls[-1] in numbers:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(self, *args, **named)

        monkeypatch.setattr(owner, name, called)
        return calls

    return replaced


PLACES = ((LowQualityProjection, "forward"), (WanModel, "forward"), (TinyVAE, "frames_of"))


@pytest.mark.parametrize(("owner", "name"), PLACES)
@pytest.mark.parametrize("numbers", [range(1), range(1, 2), range(7, 10)], ids=str)
def test_out_of_memory_costs_time_alone(
    files: UpscaleFiles,
    undisturbed: Tensor,
    full_at: Callable[..., list[int]],
    owner: type[nn.Module],
    name: str,
    numbers: range,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the first step or a later one, of its first latent frame or the next; once, or until the transformer left."""
    calls = full_at(owner, name, numbers)
    made = upscaled(files)
    if numbers.start < len(calls):
        assert "out of VRAM" in caplog.text
    # a leaner plan multiplies other numbers of rows at a time
    assert int((made.int() - undisturbed.int()).abs().max()) <= (owner is WanModel)


def test_nothing_of_a_pass_stays_until_cycles_are_looked_for(
    files: UpscaleFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, added, alive = stream.UpscaleStream._denoised, [], []

    def watched(self: stream.UpscaleStream, additions: tuple[Tensor, ...]) -> Tensor:
        added.extend(map(weakref.ref, additions))
        return real(self, additions)

    def pictures(self: stream.UpscaleStream, *given: Any) -> Tensor:
        alive.extend(each for each in added if each() is not None)
        return shown(self, *given)

    shown = stream.UpscaleStream._pictures
    monkeypatch.setattr(stream.UpscaleStream, "_denoised", watched)
    monkeypatch.setattr(stream.UpscaleStream, "_pictures", pictures)
    # as it does where it can: a function that keeps the one that was given
    monkeypatch.setattr(torch.compiler, "disable", lambda function: lambda *given: function(*given))
    gc.disable()
    try:
        upscaled(files)
    finally:
        gc.enable()
    assert added and not alive


def test_memory_that_never_suffices_is_told(files: UpscaleFiles, full_at: Callable[..., list[int]]) -> None:
    calls = full_at(TinyVAE, "frames_of", range(100))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        upscaled(files)
    assert len(calls) == len(stream.ROOMS)


def test_a_run_that_parks_from_the_start_has_one_try_less(
    files: UpscaleFiles, full_at: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = DecoderMemory.__init__

    def parked(self: DecoderMemory, device: torch.device, budget: Any, parked: bool) -> None:
        given(self, device, budget, True)

    monkeypatch.setattr(DecoderMemory, "__init__", parked)
    calls = full_at(TinyVAE, "frames_of", range(100))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        upscaled(files)
    assert len(calls) == len(stream.ROOMS) - 1


def test_what_sufficed_is_kept_to(files: UpscaleFiles, full_at: Callable[..., list[int]]) -> None:
    calls = full_at(TinyVAE, "frames_of", range(2))
    upscaled(files)
    assert len(calls) == 6 + 2 + 2  # latent frames of two steps, and the two tries


def test_what_is_parked_is_the_same(files: UpscaleFiles, undisturbed: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROOMS", stream.ROOMS[1:])
    assert torch.equal(upscaled(files), undisturbed)


def test_what_ram_has_no_room_for_is_on_the_disk(
    files: UpscaleFiles, undisturbed: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = property(lambda size: 1 << 60)
    monkeypatch.setattr(WindowSize, "host_bytes", large)
    upscaler = Upscaler(files, RunSettings())
    with upscaler.opened(REQUEST, (64, 64), tmp_path) as opened:
        (place,) = tmp_path.iterdir()
        layers = list(place.glob("windows_*"))
        assert len(layers) == 2 and all(layer.stat().st_size for layer in layers)
        made = torch.cat(list(stream.made(opened, iter(small_video(29, 64, 64)))))
    assert torch.equal(made, undisturbed)
    assert not list(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_windows, "allocate_on_disk", full)
    said = r"has no room for it either \(No space left on device\): free some of the disk"
    with pytest.raises(ValueError, match=said), upscaler.opened(REQUEST, (64, 64), tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def steps(memory: DecoderMemory, num_steps: int) -> Iterator[Tensor]:
    for step in range(num_steps):
        for attempt in range(2):  # the first one fails
            memory.begin()
            for number in range(2):
                seen = memory.get(3)
                memory[3] = torch.full((1, 2, 2, 2), 10.0 * step + number + 0.5 * (1 - attempt))
                if attempt:
                    yield torch.tensor([]) if seen is None else seen
        memory.commit()


def test_ram_that_does_not_suffice_for_parking_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = DecoderMemory(torch.device("cpu"))
    memory.begin()
    for place in range(3):
        memory[place] = torch.full((4,), float(place))
    memory.commit()
    allocated: list[int] = []

    def full(nbytes: int) -> Tensor:
        allocated.append(nbytes)
        if len(allocated) == 2:
            raise MemoryError("no more RAM")
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(pinned_memory, "allocate_extent", full)
    with pytest.raises(MemoryError):
        memory.park()
    assert not memory.is_parked and sorted(memory) == [0, 1, 2]
    memory.park()
    assert memory.is_parked and [memory[place][0].item() for place in range(3)] == [0, 1, 2]


def test_a_step_that_failed_changes_nothing_and_parking_takes_two_places() -> None:
    pinned: list[Tensor] = []
    budget = SimpleNamespace(pin=lambda extent, is_new: pinned.append(extent), unpin=pinned.remove)
    parked = DecoderMemory(torch.device("cpu"), budget, parked=True)  # type: ignore[arg-type]
    said = [each.flatten()[:1].tolist() for each in steps(parked, 4)]
    assert said == [each.flatten()[:1].tolist() for each in steps(DecoderMemory(torch.device("cpu")), 4)]
    assert said == [[], [0], [1], [10], [11], [20], [21], [30]]
    assert len(pinned) == 2


IMPORTED_IN_A_PASS = """
import gc, weakref, torch
from lowvram_video.system.torch_compiler import outside_graphs

class Pool: pass

def run_pass():
    pool = Pool()
    outside_graphs(lambda: None)
    return weakref.ref(pool)

gc.collect(); gc.freeze(); gc.disable()
assert run_pass()() is None
"""


def test_the_first_pass_of_a_process_keeps_nothing() -> None:
    """PyTorch's compiler, when it is imported, leaves cycles that hold the frames of all its callers."""
    subprocess.run([sys.executable, "-c", IMPORTED_IN_A_PASS], check=True)
