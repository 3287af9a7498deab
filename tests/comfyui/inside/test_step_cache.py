"""Step Cache in a real ComfyUI: prompts kept apart, two samplers, recorded runs, interrupts, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_pack.nodes.bridge.wan_engine import WanEngine
from lowvram_pack.nodes.plan import VramPlan
from lowvram_pack.nodes.report import MemoryReport
from lowvram_pack.nodes.resumable import ResumableSampling
from lowvram_pack.nodes.step_cache import StepCacheNode
from test_native_nodes import with_easycache
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save

STEPS = 12


def cached(
    model: Any, threshold: float = 1.0, start: float = 0.0, end: float = 1.0, method: str = "first_block", most: int = 0
) -> Any:
    return StepCacheNode.execute(model, method, threshold, start, end, most, "auto", "auto").result[0]


def run(model: Any, **changes: Any) -> torch.Tensor:
    return sample(model, *prompts(), empty_latent(), **{"steps": STEPS, **changes})


def skipped(model: Any) -> dict[int, int]:
    """Of each step with any: how many of its passes were skipped."""
    return {step: skips for step, _, skips in model.engine.streamed.step_cache.reading().passes if skips}


def held_by(model: Any) -> list[torch.Tensor]:
    """Residuals that are still there."""
    caches = model.engine.streamed.step_cache._caches.values()
    return [cache.residual for cache in caches if cache.residual is not None]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


def test_steps_are_skipped_where_it_says(models: Path) -> None:
    path = save(models, "t2v")
    model = cached(ours(path), start=0.25, end=0.75)
    got = run(model)
    steps = sorted(skipped(model))
    assert steps and min(steps) >= 3 and max(steps) <= 9
    assert got.isfinite().all() and not torch.equal(got, run(ours(path)))
    text = MemoryReport.execute(model).result[0]
    assert not held_by(model), "the run is over"
    assert "step cache: first_block below 1, from 25 to 75 % of the steps" in text and "skipped" in text


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "heun", "res_multistep"])
def test_nothing_is_skipped_at_once_a_step_is_nothing_like_the_last(models: Path, sampler: str) -> None:
    """A threshold that nothing is below gives the run without a cache, bit for bit, whatever the sampler asks."""
    path = save(models, "t2v")
    want = run(ours(path), sampler_name=sampler)
    assert torch.equal(run(cached(ours(path), threshold=1e-9), sampler_name=sampler), want)


def test_prompts_in_one_batch_are_as_those_in_turn(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Core batches cond and uncond where there is room; what each adds is its own either way."""
    path = save(models, "t2v")
    together = cached(ours(path), threshold=100.0)
    batches: list[int] = []
    inner = WanEngine.run

    def seen(engine: Any, latent: torch.Tensor, *more: Any) -> torch.Tensor:
        batches.append(len(latent))
        return inner(engine, latent, *more)

    monkeypatch.setattr(WanEngine, "run", seen)
    one = run(together)
    # 0.8 asks the device, newer ones the MODEL
    monkeypatch.setattr(type(together), "get_free_memory", lambda *a: 0.0)
    monkeypatch.setattr(type(together.model), "memory_required", lambda *a, **k: 1e18)
    other = run(cached(ours(path), threshold=100.0))
    assert {1, 2} <= set(batches)
    assert relative_error(one, other) < 1e-4


def test_two_samplers_are_two_runs_of_one_schedule(models: Path) -> None:
    """The second begins with a computed step, and knows that 6 of its 12 steps are the last ones."""
    import nodes

    model = cached(ours(save(models, "t2v")), threshold=100.0, start=0.3, end=0.9)
    half = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    args = (model, 5, *(half[key] for key in ("steps", "cfg", "sampler_name", "scheduler")), *prompts())
    first = nodes.common_ksampler(*args, empty_latent(), start_step=0, last_step=6, force_full_denoise=False)[0]
    assert sorted(skipped(model)) == [4]  # 30 % are over with the fourth; the last of each run is computed
    nodes.common_ksampler(*args, first, disable_noise=True, start_step=6, last_step=10000)
    assert sorted(skipped(model)) == [1, 2, 3, 4]
    assert model.engine.streamed.step_cache.reading().off == ""


def test_few_steps_are_computed_with_a_word(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = save(models, "t2v")
    assert torch.equal(run(cached(ours(path), threshold=100.0), steps=8), run(ours(path), steps=8))
    assert "step cache: off for 8 steps" in caplog.text


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [5, 9])
def test_a_recorded_run_goes_on_to_the_same_bits(
    models: Path, output: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """What was skipped is skipped again: the pass that left it is made once more."""
    path = save(models, "t2v")
    whole = cached(ours(path), threshold=0.15)
    want = run(whole)
    assert 3 <= len(skipped(whole)) <= STEPS - 3, skipped(whole)

    def make() -> torch.Tensor:
        return run(ResumableSampling.execute(cached(ours(path), threshold=0.15)).result[0])

    inner, count = WanEngine.run, 0

    def stopping(engine: Any, *arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == stop:
            raise Stop
        return inner(engine, *arguments)

    monkeypatch.setattr(WanEngine, "run", stopping)
    with pytest.raises(Stop):
        make()
    assert torch.equal(make(), want)


def test_an_interrupted_run_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as mm

    path = save(models, "t2v")
    model = cached(ours(path))
    want = run(model)
    inner, count = WanEngine.run, 0

    def stopping(engine: Any, *arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 8:
            raise mm.InterruptProcessingException
        return inner(engine, *arguments)

    monkeypatch.setattr(WanEngine, "run", stopping)
    with pytest.raises(mm.InterruptProcessingException):
        run(model)
    assert not held_by(model)
    assert torch.equal(run(model), want)


def test_a_model_without_the_node_computes_all_steps(models: Path) -> None:
    path = save(models, "t2v")
    model = ours(path)
    want = run(model)
    run(cached(model))
    assert torch.equal(run(model), want), "clones share an engine, and the node is on one of them"


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_easycache_beside_it_is_refused(models: Path, first: str) -> None:
    model = ours(save(models, "t2v"))
    with pytest.raises(ValueError, match="each would skip steps without knowing of the other's"):
        run(with_easycache(cached(model)) if first == "ours" else cached(with_easycache(model)))


def test_it_is_in_the_plan(models: Path) -> None:
    model = ours(save(models, "t2v"))
    texts = [VramPlan.execute(each, 832, 480, 81, True, 12.0).result[1] for each in (model, cached(model))]
    assert texts[0] != texts[1]


def test_what_it_is_not_for(models: Path) -> None:
    path = save(models, "t2v")
    with pytest.raises(ValueError, match=r"Step Cache \(Low VRAM\) works on models of Load Wan Video Model"):
        cached(core(path))
    with pytest.raises(ValueError, match="no table of a step cache is published for a Wan t2v model of 256 channels"):
        cached(ours(path), method="teacache")
