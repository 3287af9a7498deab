"""One run after another of one pipeline: plans that ran out of memory, and preparation that did."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.framepack.pipeline import FramePackFiles, FramePackPipeline
from lowvram_video.framepack.run.host import RunPlaces
from lowvram_video.framepack.run.run import FramePackRun
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.framepack.vae.model import HunyuanVAE, VAEConfig
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.runtime.latent_watch import BadLatents
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.sampling import guidance
from lowvram_video.video.growing_video import Grows
from torch import Tensor

from .test_framepack_encoders import write
from .test_framepack_generation import SAMPLING, material
from .tiny import randomize
from .tiny_framepack import save_framepack


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FramePackFiles:
    folder = tmp_path_factory.mktemp("framepack_run")
    vae = randomize(HunyuanVAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=8)))
    write(folder / "vae.safetensors", vae.state_dict())
    return FramePackFiles(save_framepack(folder / "framepack.safetensors"), folder / "vae.safetensors")


class Shapes:
    """An output that keeps what it was given: the sizes of sections, and how it was ended."""

    def __init__(self) -> None:
        self.sections: list[tuple[int, ...]] = []
        self.ended = ""

    @property
    def num_sections(self) -> int:
        return len(self.sections)

    def add(self, frames: Tensor, overlap: int) -> None:
        self.sections.append(tuple(frames.shape))

    def begin(self, pieces: object, still_open: int) -> None:
        raise AssertionError

    def leave(self) -> None:
        self.ended = "left"

    def finish(self) -> None:
        self.ended = "finished"


class ShortOfMemory(FramePackPipeline):
    """Its device runs out of memory at the first start, and only then."""

    def __init__(self, files: FramePackFiles) -> None:
        super().__init__(files, RunSettings())
        self.plans: list[MemoryPlan] = []

    def start(self, plan: MemoryPlan) -> None:
        self.plans.append(plan)
        super().start(plan)
        if len(self.plans) == 1:
            self.model.plan = replace(plan, limits=replace(plan.limits, vram_budget_bytes=1))


def make(pipeline: FramePackPipeline, folder: Path, **changes: object) -> tuple[Tensor, Shapes]:
    shapes = Shapes()

    def output(_: Path, __: Grows) -> Shapes:
        return shapes

    places = RunPlaces(None, folder, output)
    with FramePackRun.open(pipeline, replace(SAMPLING, **changes), material(), places) as run:
        return run.make(), shapes


def test_a_leaner_plan_holds_for_the_run_and_no_longer(files: FramePackFiles, tmp_path: Path) -> None:
    pipeline = ShortOfMemory(files)
    latents, shapes = make(pipeline, tmp_path)
    assert latents.shape[2] == 10 and len(shapes.sections) == 3 and shapes.ended == "finished"
    assert [plan.limits.vram_budget_bytes == 1 for plan in pipeline.plans] == [False, True, True]
    make(pipeline, tmp_path)
    assert [plan.limits.vram_budget_bytes == 1 for plan in pipeline.plans[3:]] == [False, False, False]


def test_another_run_of_a_pipeline_has_a_plan_of_its_own(files: FramePackFiles, tmp_path: Path) -> None:
    pipeline, fresh = (FramePackPipeline(files, RunSettings()) for _ in range(2))
    make(pipeline, tmp_path)
    make(pipeline, tmp_path, window=9, cfg=1.0, seconds=0.5)
    make(fresh, tmp_path, window=9, cfg=1.0, seconds=0.5)
    plan, wanted = pipeline.model.plan, fresh.model.plan
    assert plan is pipeline.plan and plan is not None and wanted is not None
    assert (plan.work, plan.choice, plan.denoise) == (wanted.work, wanted.choice, wanted.denoise)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_preparation_is_tried_again_when_the_device_was_full(
    files: FramePackFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    wanted, _ = make(FramePackPipeline(files, RunSettings()), tmp_path)
    prepared, calls = StreamedFramePack.prepared, []

    def short(self: StreamedFramePack, *given: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return prepared(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamedFramePack, "prepared", short)
    latents, _ = make(FramePackPipeline(files, RunSettings()), tmp_path)
    assert torch.equal(latents, wanted) and len(calls) == 2


def test_other_errors_end_the_run_and_leave_its_output(
    files: FramePackFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(StreamedFramePack, "prepared", fail)
    shapes = Shapes()
    pipeline = FramePackPipeline(files, RunSettings())
    places = RunPlaces(None, tmp_path, lambda _, __: shapes)
    with pytest.raises(RuntimeError, match="a bug"), FramePackRun.open(pipeline, SAMPLING, material(), places) as run:
        run.make()
    assert shapes.ended == "left" and not pipeline.model.started and not list(tmp_path.iterdir())


# --- latents that are no use ------------------------------------------------------------------------------


class Sick(Sdpa):
    """An attention kernel that overflows from its n-th call on."""

    name = "sick"
    calls, sound = 0, 0

    def attend(self, *arguments, **named):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().attend(*arguments, **named) * (1.0 if self.calls <= self.sound else math.inf)


def sick(files: FramePackFiles, sound: int) -> FramePackPipeline:
    pipeline, attention = FramePackPipeline(files, RunSettings()), Sick(torch.device("cpu"))
    attention.sound = sound
    pipeline.model.model.execution = replace(pipeline.model.model.execution, attention=attention)
    return pipeline


def made(pipeline: FramePackPipeline, folder: Path, stop_at: int | None = None) -> Tensor:
    """The latents of a run that is kept; it is interrupted when so many sections are there."""

    class Output(Shapes):
        def add(self, frames: Tensor, overlap: int) -> None:
            super().add(frames, overlap)
            if self.num_sections == stop_at:
                raise KeyboardInterrupt

    places = RunPlaces(folder / "runs", folder, lambda _, __: Output())
    with FramePackRun.open(pipeline, SAMPLING, material(), places) as run:
        return run.make()


def attention_calls(files: FramePackFiles, folder: Path) -> int:
    """Of a run whose attention is right."""
    pipeline = sick(files, sound=10**9)
    made(pipeline, folder)
    attention = pipeline.model.model.execution.attention
    assert isinstance(attention, Sick)
    return attention.calls


def test_a_section_is_made_once_more_on_the_safe_path(
    files: FramePackFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those before it are kept, and the rest of the run stays on that path; the next run does not."""
    whole, _ = make(FramePackPipeline(files, RunSettings()), tmp_path)
    calls = attention_calls(files, tmp_path / "count")
    pipeline = sick(files, sound=calls // 2)  # in the second of three sections
    assert torch.equal(made(pipeline, tmp_path), whole)
    assert caplog.text.count("is made once more") == 1 and "section 2 is made once more" in caplog.text
    assert pipeline.model.model.execution.attention.name == "sick"


def test_a_run_that_took_the_safe_path_goes_on_there(files: FramePackFiles, tmp_path: Path) -> None:
    """Bit for bit, though the kernel is right again: it is exact in other bits."""
    calls = attention_calls(files, tmp_path / "count")

    class Halved(Sick):
        """Right to the eye, and in other bits."""

        def attend(self, query, *arguments, **named):  # type: ignore[no-untyped-def]
            return super().attend(query * 1.01, *arguments, **named)

    def halved(sound: int) -> FramePackPipeline:
        pipeline, attention = sick(files, 0), Halved(torch.device("cpu"))
        attention.sound = sound
        pipeline.model.model.execution = replace(pipeline.model.model.execution, attention=attention)
        return pipeline

    whole = made(halved(calls // 2), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(halved(calls // 2), tmp_path, stop_at=2)
    assert torch.equal(made(halved(10**9), tmp_path), whole)
    assert not torch.equal(made(halved(10**9), tmp_path / "right"), whole)


@pytest.mark.parametrize(("at", "kept"), [(0, False), (2, True)])
def test_a_fault_that_passes_costs_a_section(
    files: FramePackFiles, tmp_path: Path, at: int, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch's attention in fp32 is the safest path: only what began right is worth another try."""
    whole, _ = make(FramePackPipeline(files, RunSettings()), tmp_path)
    pipeline = FramePackPipeline(files, RunSettings())
    passes: list[int] = []

    def fault(module: object, given: object, made: Tensor) -> Tensor:
        passes.append(1)
        return torch.full_like(made, math.nan) if len(passes) == at + 1 else made

    pipeline.model.model.register_forward_hook(fault)
    if not kept:
        with pytest.raises(BadLatents, match="NaN or infinite numbers after its first step"):
            made(pipeline, tmp_path)
        return
    assert torch.equal(made(pipeline, tmp_path), whole)
    assert "section 1 is made once more" in caplog.text


def test_out_of_memory_between_passes_costs_a_section(
    files: FramePackFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = make(FramePackPipeline(files, RunSettings()), tmp_path)
    calls, plain = [], guidance.velocity_to_denoised

    def full(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
        calls.append(1)
        if len(calls) == 6:  # the second step of the second section
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return plain(x, velocity, sigma)

    monkeypatch.setattr(guidance, "velocity_to_denoised", full)
    assert torch.equal(made(FramePackPipeline(files, RunSettings()), tmp_path), whole)
    assert "out of VRAM between two passes: section 2 is made once more" in caplog.text
