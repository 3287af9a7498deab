"""The run's record: one clock for rings that come and go, phases, what was pinned, what others hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_video.memory.plan.footprint import GIB, Limits, WorkSize
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.memory.report.report import MemoryMonitor, RunReport
from lowvram_video.memory.stream.ring import DeviceRing
from lowvram_video.runtime import run_record
from lowvram_video.runtime.run_record import RunRecord
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer.execution import Execution
from lowvram_video.wanvideo.streamed import StreamedWan

from .test_pipeline import UNLIMITED, Scarce, inputs
from .timed_streams import TimedInlineStreams
from .tiny import save_wan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Timed(StreamedWan):
    """Streams on the CPU, and tells what ran when."""

    def _make_ring(self, plan: MemoryPlan) -> DeviceRing:
        assert self._on_spans is not None
        return DeviceRing(plan.blocks.ring_bytes, CPU, TimedInlineStreams(self._on_spans))


def plan_of(model: Timed) -> MemoryPlan:
    """With leaner plans behind it."""
    return model.make_plan(WorkSize(401, 720, 1280), Limits(UNLIMITED, blocks_to_swap=3))


def check_passes(report: RunReport, wanted: int) -> None:
    """They follow each other, and none is outside the phase."""
    (denoise,) = report.phases
    assert report.stream is not None and report.stream.num_passes == len(report.passes) == wanted
    ends = [(denoise.start, denoise.start), *report.passes, (denoise.start + denoise.seconds,) * 2]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    # a retry and a plan take their time before a pass, and nothing comes after the last
    assert denoise.start + denoise.seconds - report.passes[-1][1] < 0.5 * denoise.seconds


@pytest.fixture
def model(tmp_path: Path) -> Timed:
    return Timed(save_wan(tmp_path / "wan.safetensors", num_layers=6), RunSettings())


@torch.inference_mode()
def test_a_retry_shifts_nothing(model: Timed) -> None:
    scarce = Scarce(range(2 * 12 + 9, 2 * 12 + 10))
    model.model.execution = replace(model.model.execution, attention=scarce)
    record = RunRecord(CPU)
    with record.run(), record.phase("denoise"):
        model.start_fitting(plan_of(model), record.add_spans)
        first = model.plan
        for _ in range(3):
            model(*inputs())
    assert model.plan is not first, "it was retried"
    model.release()
    check_passes(record.report(), 4)


@torch.inference_mode()
def test_a_model_that_is_planned_anew_shifts_nothing(model: Timed) -> None:
    record = RunRecord(CPU)
    with record.run(), record.phase("denoise"):
        for _ in range(2):
            model.start_fitting(plan_of(model), record.add_spans)
            model(*inputs())
            model(*inputs())
    model.release()
    report = record.report()
    check_passes(report, 4)
    assert len(report.copies) == 12, "what was prefetched for a pass that did not come counts too"
    with record.run():
        pass
    assert record.report().stream is None, "a new run knows nothing of the last one"


@torch.inference_mode()
def test_prompts_that_take_turns_are_counted_on(model: Timed) -> None:
    """The model plans anew for so many, by itself."""
    record = RunRecord(CPU)
    plan = model.make_plan(WorkSize(5, 32, 48), Limits(UNLIMITED, blocks_to_swap=6))
    latent, timestep, _ = inputs()
    texts = [torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with record.run(), record.phase("denoise"):
        model.start_fitting(first := replace(plan, choice=replace(plan.choice, cache_text_kv=True)), record.add_spans)
        for text in texts * 2:
            model(latent, timestep, text)
    assert model.plan is not first
    model.release()
    check_passes(record.report(), 6)


def test_a_run_within_a_run_is_a_part_of_it() -> None:
    record = RunRecord(CPU)
    with record.run():
        with record.phase("encode"):
            pass
        with record.run():
            for _ in range(2):
                with record.phase("denoise"):
                    pass
        assert record.running
    assert not record.running
    names = [phase.name for phase in record.report().phases]
    assert names == ["encode", "denoise"]
    record.begin("denoise")
    record.end()
    record.end()
    assert [phase.name for phase in record.report().phases] == ["denoise"]


def fake_model(pinned_bytes: int, denoise: int = 0, decode: int = 0) -> Any:
    limits = Limits(8 * GIB, context_bytes=GIB // 2)
    plan = SimpleNamespace(denoise=SimpleNamespace(total=denoise), decode=SimpleNamespace(total=decode), limits=limits)
    network = SimpleNamespace(execution=Execution())
    of_model = {"step_cache": None, "compiled": None, "parked_blocks": list}
    return SimpleNamespace(pinned_bytes=pinned_bytes, plan=plan, model=network, **of_model)


def test_all_models_that_ran_count(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [3 * GIB, 2 * GIB, 4 * GIB]  # by others: at first, when models are on their device
    monkeypatch.setattr(run_record, "outside_bytes", lambda device: held.pop(0))
    monkeypatch.setattr(run_record, "MemoryMonitor", lambda device: MemoryMonitor(CPU))
    record = RunRecord(CUDA)
    high, low = fake_model(5, denoise=70, decode=30), fake_model(6, denoise=60)
    with record.run():
        for name in ("denoise", "decode", "encode"):
            with record.phase(name):
                pass
        record.uses(high)
        high.pinned_bytes = 1  # it was given back
        record.uses(low)
        low.pinned_bytes = 0
    report = record.report()
    assert report.pinned_bytes == 7
    assert report.budget_bytes == 8 * GIB
    assert report.other_bytes == 3 * GIB // 2, "what others held all along, without the process's context"
    assert {phase.name: phase.predicted_bytes for phase in report.phases} == {
        "denoise": 70, "decode": 30, "encode": None
    }  # fmt: skip
