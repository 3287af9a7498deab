"""The room that other models of ComfyUI take, leave or keep when ours runs."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import pytest
import torch
from lowvram_pack.memory.plan.plan import PlanError
from lowvram_pack.memory.plan.rates import Rates
from lowvram_pack.memory.report.report import MemoryMonitor
from lowvram_pack.memory.stream.host_blocks import HostBlocks
from lowvram_pack.nodes.bridge import host
from lowvram_pack.nodes.bridge import room as room_module
from lowvram_pack.nodes.bridge.patcher import StreamedModelPatcher
from lowvram_pack.nodes.plan import VramPlan
from lowvram_pack.runtime import run_record
from tiny_models import empty_latent, ours, prompts, sample, save

GIB = 2**30
CUDA = torch.device("cuda", 0)


class Other(comfy.model_patcher.ModelPatcher):
    """A model of ComfyUI's that has so much on the card."""

    def __init__(self, loaded: int = GIB):
        super().__init__(torch.nn.Linear(1, 1), CUDA, torch.device("cpu"))
        self.loaded = loaded

    def loaded_size(self) -> int:
        return self.loaded

    def __del__(self) -> None:
        pass  # it never was on the card


class Patch:
    """A patch of core's nodes that brings a model of its own."""

    def __init__(self, model: Other):
        self.model = model

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        return given

    def models(self) -> list[Other]:
        return [self.model]


def load_on_card(monkeypatch: pytest.MonkeyPatch, *patchers: Any) -> None:
    loaded = [mm.LoadedModel(patcher) for patcher in patchers]
    for one in loaded:
        one.device = CUDA
    monkeypatch.setattr(mm, "current_loaded_models", loaded)


def test_a_hard_budget_keeps_what_runs_beside_the_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(mm, "free_memory", lambda size, device, keep_loaded: kept.extend(keep_loaded))
    model = ours(save(models, "t2v")).clone()
    other, of_patch, additional, nested = Other(), Other(), Other(), Other()
    model.set_model_patch(Patch(of_patch), "attn2_patch")
    model.set_additional_models("control", [additional])
    additional.set_additional_models("more", [nested])
    load_on_card(monkeypatch, model, other, of_patch, additional, nested)
    host.unload_others(model.model, CUDA)
    assert [one.model for one in kept] == [model, of_patch, additional, nested]


def on_a_card(model: StreamedModelPatcher, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Have the engine believe in a card with so much free."""
    streamed = model.engine.streamed
    monkeypatch.setattr(streamed, "settings", replace(streamed.settings, device=CUDA))
    monkeypatch.setattr(host, "free_vram", lambda device: free)
    monkeypatch.setattr(host, "reserved_vram", lambda: 0)
    monkeypatch.setattr(host, "compute_device", lambda: CUDA)
    monkeypatch.setattr(room_module, "measure_rates", lambda device: Rates(100.0, 100.0, 20.0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GIB)


def test_the_plan_counts_on_what_core_will_evict(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = ours(save(models, "t2v")), Other(3 * GIB)
    on_a_card(model, monkeypatch, GIB)
    load_on_card(monkeypatch, model, other)
    engine = model.engine
    work = engine.video_work(832, 480, 81, 2)
    context = engine.room.limits(model.options).context_bytes
    assert engine.room.limits(model.options).vram_budget_bytes == GIB + context
    assert engine.preview(work, model.options).budget_bytes == 4 * GIB + context
    budget = model.with_options(vram_budget_gb=3.5)
    assert engine.preview(work, budget.options).budget_bytes == int(3.5 * GIB)
    assert f"{4 + context / GIB:.2f} GiB" in VramPlan.execute(model, 832, 480, 81, True, 0.0).result[1]
    assert engine.streamed.plan is None, "a plan that is shown is none that runs"


def test_a_container_may_take_less_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm, "get_free_memory", lambda device: 200 * GIB)
    monkeypatch.setattr(host, "available_ram_bytes", lambda: 20 * GIB)
    assert host.free_ram() == 20 * GIB
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 240 * GIB)
    monkeypatch.setattr(mm, "TOTAL_PINNED_MEMORY", GIB)
    monkeypatch.setattr(host, "default_pinned_cap", lambda: 27 * GIB)
    assert host.pinnable_bytes() == 26 * GIB


def test_a_plan_that_does_not_fit_beside_another_model_has_its_room(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models that take turns within a step: the first one planned with all that was free."""
    model, other = ours(save(models, "t2v")), Other(6 * GIB)
    engine = model.engine
    work = engine.video_work(832, 480, 81, 2)
    on_a_card(model, monkeypatch, GIB // 8)
    with pytest.raises(PlanError):
        engine.plan(work)
    load_on_card(monkeypatch, model, other)
    evicted: list[Any] = []

    def free_memory(size: float, device: torch.device, keep_loaded: list[Any]) -> None:
        evicted.extend(loaded.model for loaded in mm.current_loaded_models if loaded not in keep_loaded)
        on_a_card(model, monkeypatch, 6 * GIB)

    monkeypatch.setattr(mm, "free_memory", free_memory)
    assert engine.plan(work).budget_bytes > 6 * GIB and evicted == [other]


def test_memory_that_was_short_once_leaves_no_later_run_lean(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save(models, "t2v"))
    streamed, started = model.engine.streamed, []
    forward, start = streamed.model.forward, streamed.start
    monkeypatch.setattr(streamed, "start", lambda plan: started.append(plan) or start(plan))
    sample(model, *prompts(), empty_latent(), steps=2)

    def scarce(*given: Any, **named: Any) -> torch.Tensor:
        if len(started) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(*given, **named)

    monkeypatch.setattr(streamed.model, "forward", scarce)
    sample(model, *prompts(), empty_latent(), steps=2)
    assert len(started) == 2, "leaner for all that is left of the run"
    assert started[1].blocks.num_resident < started[0].blocks.num_resident
    sample(model, *prompts(), empty_latent(), steps=2)
    assert len(started) == 3 and started[2].blocks == started[0].blocks
    sample(model, *prompts(), empty_latent(), steps=2)
    assert len(started) == 3, "what runs as well as it can stays where it is"


def test_loading_is_within_the_budget_too(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save(models, "t2v"))
    engine, begun = model.engine, []
    within, start = engine.within_budget, engine.streamed.start_fitting

    @contextmanager
    def watched() -> Any:
        with within():
            begun.append("budget")
            yield
            begun.append("free")

    monkeypatch.setattr(engine, "within_budget", watched)
    monkeypatch.setattr(engine.streamed, "start_fitting", lambda *given: begun.append("loading") or start(*given))
    sample(model, *prompts(), empty_latent(), steps=1)
    assert begun[:3] == ["budget", "loading", "free"]


def test_what_others_hold_is_not_the_runs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save(models, "t2v"))
    monkeypatch.setattr(run_record, "outside_bytes", lambda device: 2 * GIB)
    record = model.engine.record
    sample(model, *prompts(), empty_latent(), steps=1)
    assert model.engine.report.other_bytes == 0, "there is no card"
    monkeypatch.setattr(record, "_device", CUDA)
    monkeypatch.setattr(run_record, "MemoryMonitor", lambda device: MemoryMonitor(torch.device("cpu")))
    model.engine.begin_run()
    streamed = model.engine.streamed
    limits = replace(streamed.plan.limits, context_bytes=GIB // 2)
    streamed.plan = replace(streamed.plan, limits=limits)
    model.engine.end_run()
    assert model.engine.report.other_bytes == 3 * GIB // 2


def test_a_named_card_is_planned_for_as_a_real_one(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save(models, "t2v"))
    on_a_card(model, monkeypatch, 20 * GIB)
    engine, options = model.engine, model.options
    real, named = engine.room.limits(options), engine.room.card_limits(options, 8.0)
    assert named == replace(real, vram_budget_bytes=int(7.5 * GIB))
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.LOW_VRAM)
    assert engine.room.card_limits(options, 8.0).blocks_to_swap == 4
    smaller = model.with_options(vram_budget_gb=6.0).options
    assert engine.room.card_limits(smaller, 8.0).vram_budget_bytes == 6 * GIB


def test_pinned_memory_stays_in_the_middle_of_a_pass(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save(models, "t2v"))
    sample(model, *prompts(), empty_latent(), steps=1)
    engine = model.engine
    engine.streamed.stop()
    unpinned: list[str] = []
    monkeypatch.setattr(HostBlocks, "unpin", lambda self: unpinned.append("unpin"))
    with engine.returning_memory():
        model.unpin_all_weights()
        assert unpinned == []
    model.unpin_all_weights()
    assert unpinned == ["unpin"]


def test_unpinning_from_within_pinning_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    registrar, unpinned = host.HostRegistrar(CUDA), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(mm, "unpin_memory", unpinned.append)

    def pin(extent: torch.Tensor) -> bool:
        registrar.unpin(extent)  # as a collected model's end does
        return True

    monkeypatch.setattr(mm, "pin_memory", pin)
    thread = threading.Thread(target=registrar.pin, args=(torch.zeros(1),), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(unpinned) == 1
