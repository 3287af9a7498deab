"""Step caches of Wan: tables, rules against what was published, what is kept apart, and runs of tiny models."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowvram_video.cli.arguments import settings_of
from lowvram_video.cli.main import main, make_parser
from lowvram_video.memory.plan.footprint import GIB, Limits
from lowvram_video.memory.plan.plan import PlanError
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.sampling.caching.followed_cache import FollowedCache
from lowvram_video.sampling.caching.measure import Change, MeasuredPass, fit_teacache
from lowvram_video.sampling.caching.moments import Moment, moment_of
from lowvram_video.sampling.caching.pass_cache import PassCache
from lowvram_video.sampling.caching.rules import FirstBlockRule, MagRule, TeaRule
from lowvram_video.sampling.caching.settings import StepCacheSettings
from lowvram_video.sampling.caching.step_cache import StepCache, first_needed
from lowvram_video.sampling.caching.tables import (
    CacheTable,
    MagTable,
    TableError,
    TeaTable,
    published_tables,
    read_table,
)
from lowvram_video.sampling.schedules import flow_sigmas
from lowvram_video.transformer.block_cache import run_cached, with_room
from lowvram_video.wanvideo.footprint import WanFootprint, WanWork, wan_work
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.step_tables import choose_table, own_table, suitable
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.fingerprint import fingerprint
from torch import Tensor

from . import tiny
from .test_cli import WAN_14B, save_sparse

STEPS = 12
REQUEST = WanRequest("a red ball", width=32, height=32, num_frames=5, num_steps=STEPS, guidance=3.0, seed=3)
OPEN = StepCacheSettings("first_block", threshold=0.3, start=0.0, end=1.0)
TABLE = CacheTable("made up", TeaTable((1.0, 0.0), 0.1), MagTable((1.0, 0.98, 0.97), (1.0, 0.9, 0.8), 0.05))


class Latents(WanPipeline):
    """Yields the latent in place of frames."""

    def _decode(self, latent: Tensor, plan: object) -> Iterator[Tensor]:
        yield latent.clone()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tiny.WanFiles:
    return tiny.save_files(tmp_path_factory.mktemp("cached"), experts=True)


def make(
    files: tiny.WanFiles, cache: StepCacheSettings | None, request: WanRequest = REQUEST, **more: object
) -> Tensor:
    return latent_of(Latents(files, RunSettings(step_cache=cache), **more), request)  # type: ignore[arg-type]


def latent_of(pipeline: WanPipeline, request: WanRequest = REQUEST) -> Tensor:
    return torch.cat(list(pipeline.generate(request)))


def skipped(pipeline: WanPipeline) -> list[int]:
    assert pipeline.high.step_cache is not None
    return [step for step, passes, skips in pipeline.high.step_cache.reading().passes if skips]


# --- rules


def test_magcache_chooses_as_published() -> None:
    """Zehong-Ma/MagCache `magcache_forward`, written out for one prompt and the table's own number of steps."""
    table = published_tables()["wan2.1_t2v_14B"].magcache
    assert table is not None
    for threshold, most in itertools.product((0.02, 0.06, 0.12), (2, 4)):
        ratio, steps, error, expected = 1.0, 0, 0.0, []
        for step in range(50):
            skip = False
            if step >= 10:
                ratio, steps = ratio * table.cond[step], steps + 1
                error += abs(1 - ratio)
                skip = error < threshold and steps <= most
                if not skip:
                    ratio, steps, error = 1.0, 0, 0.0
            expected.append(skip)
        cache = PassCache(MagRule([table.cond]), threshold, most)
        got = []
        for step in range(50):
            cache.begin(step / 50, allowed=step >= 10)
            got.append(cache.reuse(torch.zeros(1, 1)))
            cache.residual = torch.zeros(1, 1)
        # the published code counts from the start of its window; ours from the last computed step
        assert got[11:] == expected[11:] or sum(got) == sum(expected), (threshold, most)
        assert sum(got) > 5


def test_a_table_keeps_what_its_ratios_multiply_to() -> None:
    table = published_tables()["wan2.1_t2v_1.3B"].magcache
    assert table is not None
    for steps in (10, 25, 30, 50, 100):
        rule = MagRule([table.cond])
        rule.settle(torch.zeros(1, 1), 0.0, None)
        error = rule.estimate(torch.zeros(1, 1), (steps - 1) / steps)
        known = min(int((steps - 1) / steps * 50), 49)
        whole = math.prod(table.cond[: known + 1])
        assert abs(error - abs(1 - whole)) < 0.03, steps


def test_the_larger_error_of_a_batch_counts() -> None:
    assert TABLE.magcache is not None
    both = TABLE.rule("magcache", [0, 1])
    alone = [TABLE.rule("magcache", [kind]) for kind in (0, 1)]
    for rule in (both, *alone):
        rule.settle(torch.zeros(1, 1), 0.0, None)
    errors = [rule.estimate(torch.zeros(1, 1), 1 / 3) for rule in (both, *alone)]
    assert errors[0] == errors[2] > errors[1]
    assert errors[1] == pytest.approx(0.02)


def test_first_block_looks_at_the_sample_that_changed_most() -> None:
    rule = FirstBlockRule(2)
    before = torch.ones(4, 3)
    assert rule.estimate(before, 0.0) == math.inf
    rule.settle(before, 0.0, None)
    now = before.clone()
    now[2:] *= 1.5
    assert rule.estimate(now, 0.1) == pytest.approx(0.5)
    rule.settle(now, 0.1, 0.5)  # skipped: it goes on comparing with the computed one
    assert rule.estimate(now, 0.2) == pytest.approx(0.5)


def test_teacache_adds_up_by_the_polynomial() -> None:
    polynomial = (2.0, 1.0, 0.5)
    rule, signals = TeaRule(polynomial), [torch.full((1, 4), value) for value in (1.0, 1.1, 1.3)]
    rule.settle(signals[0], 0.0, None)
    first = np.poly1d(polynomial)(0.1)
    error = rule.estimate(signals[1], 0.1)
    assert error == pytest.approx(first, rel=1e-5)
    rule.settle(signals[1], 0.1, error)
    assert rule.estimate(signals[2], 0.2) == pytest.approx(first + np.poly1d(polynomial)(0.2 / 1.1), rel=1e-5)


def test_a_threshold_of_0_computes_every_step() -> None:
    """Also where a published polynomial is below 0, as that of Wan 14B is for small changes."""
    table = published_tables()["wan2.1_t2v_14B"]
    cache = PassCache(table.rule("teacache", [0]), 0.0)
    reused = []
    for step in range(5):
        cache.begin(step / 5, allowed=True)
        reused.append(cache.reuse(torch.full((1, 4), 1.05**step)))
        cache.residual = torch.zeros(1, 4)
    assert not any(reused)


def test_no_more_in_a_row_than_said() -> None:
    cache = PassCache(MagRule([(1.0, 1.0)]), 0.5, max_skips=2)
    reused = []
    for step in range(9):
        cache.begin(step / 9, allowed=step > 0)
        reused.append(cache.reuse(torch.zeros(1, 1)))
        cache.residual = torch.zeros(1, 1)
    assert reused == [False, True, True, False, True, True, False, True, True]


# --- moments


def test_a_part_of_a_schedule_is_known_as_such() -> None:
    """Two samplers, as KSamplerAdvanced cuts them: places and the number of steps are those of the whole."""
    levels = flow_sigmas(20, 5.0).tolist()
    whole = [moment_of(levels, level, 5.0) for level in levels[:-1]]
    assert [moment.place for moment in whole] == pytest.approx([step / 20 for step in range(20)], abs=1e-5)
    for part in (levels[:9], levels[8:]):
        moments = [moment_of(part, level, 5.0) for level in part[:-1]]
        assert {moment.num_steps for moment in moments} == {20}
        assert [moment.step for moment in moments] == list(range(len(part) - 1))
        assert moments[-1].place == moments[-1].last
    assert moment_of(levels[:9], levels[3], None) == Moment(3 / 8, 7 / 8, 8, 3)
    between = moment_of(levels, (levels[3] + levels[4]) / 2, None)
    assert between.step == 3 and between.place == pytest.approx(3.5 / 20)


# --- what is kept apart


def test_each_prompt_has_its_own_state() -> None:
    cache = StepCache(OPEN, TABLE)
    cache.begin_run()
    cache.at(Moment(0.0, 0.9, 20, 0))
    cond, uncond = ((0, "a"),), ((1, "b"),)
    first, second = cache.of(cond), cache.of(uncond)
    assert first is not None and second is not None and first is not second
    first.reuse(torch.ones(1, 2))
    first.residual = torch.ones(1, 2)
    assert second.residual is None
    assert cache.of(cond) is first and cache.of((*cond, *uncond)) not in (first, second)
    assert cache.of(()) is None


def test_cond_and_uncond_add_their_own_residuals(files: tiny.WanFiles) -> None:
    """Against the network called by hand, with residuals of each prompt kept apart."""
    model = tiny.randomize(tiny.WanModel(tiny.CONFIGS["t2v"])).eval()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 16, 2, 4, 4, generator=generator)
    texts = torch.randn(2, 512, tiny.TEXT_DIM, generator=generator)
    cache = StepCache(StepCacheSettings("magcache", 10.0, 0.0, 1.0), TABLE)
    cache.begin_run()
    timesteps = torch.tensor([900.0])

    def run(step: int, which: int) -> Tensor:
        cache.at(Moment(step / 20, 0.95, 20, step))
        prompts = ((which, which),)
        found = cache.of(prompts)
        made = model(latent[step : step + 1], timesteps, texts[which : which + 1], extras=extras(prompts, found))
        assert found is not None
        cache.done(prompts, found)
        return made

    with torch.no_grad():
        for which in (0, 1):
            run(0, which)
        residuals = [cache.of(((which, which),)).residual.clone() for which in (0, 1)]  # type: ignore[union-attr]
        outs = [run(1, which) for which in (0, 1)]
        assert not torch.allclose(residuals[0], residuals[1], rtol=1e-2)
        assert cache.reading().passes == ((0, 2, 0), (1, 2, 2))
        work = model.workspace(residuals[0].shape[0], latent.device)
        tokens = model.patch_embedding(latent[1:], work)
        time, _ = model.embed_time(timesteps)
        for out, residual in zip(outs, residuals, strict=True):
            patches = model.head(tokens + residual, time, len(tokens), work)
            want = model.patch_embedding.unpatchify_into(torch.empty_like(out), patches)
            assert torch.allclose(out, want, atol=1e-5)


def extras(prompts: tuple[tuple[int, object], ...], cache: object) -> object:
    from lowvram_video.wanvideo.network.model import Extras

    return Extras(prompts=prompts, cache=cache)  # type: ignore[arg-type]


def test_residuals_in_ram_are_those_on_the_device() -> None:
    """As where no device has room: through a few spare bytes at a time (here `meta` stands for no device)."""
    generator = torch.Generator().manual_seed(0)
    start, added = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)

    class Apart(torch.Tensor):
        """Says that it is elsewhere."""

        device = torch.device("meta")

    def blocks(x: Tensor) -> Callable[[], Iterator[None]]:
        def run() -> Iterator[None]:
            x.add_(added)
            yield

        return run

    cache = PassCache(MagRule([(1.0, 1.0)]), 0.5, make_room=lambda *a, **how: torch.empty(*a, **how).as_subclass(Apart))
    for step, expected in ((0, start + added), (1, start + added)):
        x, spare = start.clone(), torch.empty(24)  # of three rows
        cache.begin(step / 9, allowed=step > 0)
        cached = with_room(cache, *x.shape, x.dtype, x.device)
        assert cached is not None
        run_cached(x, blocks(x)(), cached, torch.zeros(1, 1), spare, 1)  # type: ignore[arg-type]
        assert torch.allclose(x.as_subclass(Tensor), expected, atol=1e-6)
    assert cache.reused


def test_residuals_are_planned_for(tmp_path: Path) -> None:
    """In VRAM where that is no slower, else in RAM, or as the user says."""
    card = Limits(12 * GIB, ram_budget_bytes=64 * GIB)
    path = save_sparse(tmp_path / "wan2.1_t2v_14B.safetensors", WAN_14B)
    work = wan_work(WAN_14B, (832, 480, 81), passes_per_step=2)
    settings = RunSettings(dtype=torch.bfloat16)
    plain = StreamedWan(path, settings).make_plan(work, card)
    one = work.tokens * WAN_14B.dim * 2
    plans = {}
    for place in ("auto", "vram", "ram"):
        cache = StepCacheSettings("magcache", residuals=place)
        plans[place] = StreamedWan(path, replace(settings, step_cache=cache)).make_plan(work, card)
    assert plans["ram"].denoise == plain.denoise
    difference = plans["vram"].denoise.total - plans["vram"].denoise.residents - plain.denoise.total
    print(f"{one / GIB:.2f} GiB each; {difference / GIB:.2f} GiB more, {plans['vram'].blocks.num_resident} residents")
    assert plans["vram"].work.residuals == 2 and plans["vram"].peak_bytes <= card.vram_budget_bytes
    assert plans["auto"] in (plans["vram"], plans["ram"])
    same = WanFootprint.activation_bytes
    model, choice = plans["vram"].model, plain.choice
    assert same(model, plans["vram"].work, choice, card) - same(model, work, choice, card) == 2 * one  # type: ignore
    small = replace(card, vram_budget_bytes=plain_least(path, work, card))
    with pytest.raises(PlanError):
        StreamedWan(path, replace(settings, step_cache=StepCacheSettings("magcache", residuals="vram"))).make_plan(
            work, small
        )
    auto = StreamedWan(path, replace(settings, step_cache=StepCacheSettings("magcache"))).make_plan(work, small)
    assert isinstance(auto.work, WanWork) and not auto.work.residuals


def plain_least(path: Path, work: WanWork, card: Limits) -> int:
    """The smallest budget that the work fits in without a step cache."""
    with pytest.raises(PlanError) as error:
        StreamedWan(path, RunSettings(dtype=torch.bfloat16)).make_plan(work, replace(card, vram_budget_bytes=GIB))
    assert error.value.smallest_budget_bytes is not None
    return error.value.smallest_budget_bytes


# --- runs


@pytest.mark.parametrize("batched", [False, True])
def test_nothing_is_skipped_at_a_threshold_of_0(files: tiny.WanFiles, batched: bool) -> None:
    one = replace(files, model_low=None)
    for cache in (replace(OPEN, threshold=0.0), StepCacheSettings("first_block", 0.0)):
        plain = latent_of(Latents(one, RunSettings(batched_guidance=batched)))
        assert latent_of(Latents(one, RunSettings(batched_guidance=batched, step_cache=cache))).equal(plain)


def test_steps_are_skipped_between_start_and_end_and_never_the_last(files: tiny.WanFiles) -> None:
    one = replace(files, model_low=None)
    pipeline = Latents(one, RunSettings(step_cache=replace(OPEN, threshold=100.0)))
    latent_of(pipeline)
    assert skipped(pipeline) == list(range(1, STEPS - 1))
    pipeline = Latents(one, RunSettings(step_cache=replace(OPEN, threshold=100.0, start=0.5, end=0.8)))
    latent_of(pipeline)
    assert skipped(pipeline) == [6, 7, 8, 9]
    assert "of 12 steps" in pipeline.report().table()


def test_another_run_begins_anew(files: tiny.WanFiles) -> None:
    one = replace(files, model_low=None)
    pipeline = Latents(one, RunSettings(step_cache=OPEN))
    other = replace(REQUEST, seed=9, height=48)
    first = latent_of(pipeline)
    latent_of(pipeline, other)
    assert latent_of(pipeline).equal(first)
    assert make(one, OPEN, other).equal(latent_of(pipeline, other))


def test_few_steps_are_all_computed_and_that_is_said(files: tiny.WanFiles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    one, request = replace(files, model_low=None), replace(REQUEST, num_steps=8)
    pipeline = Latents(one, RunSettings(step_cache=replace(OPEN, threshold=100.0)))
    assert latent_of(pipeline, request).equal(make(one, None, request))
    assert "step cache: off for 8 steps" in caplog.text
    assert "off for 8 steps" in pipeline.report().table()


def test_each_expert_begins_anew(files: tiny.WanFiles) -> None:
    """The first pass of the low-noise expert is computed: it has nothing of the other's."""
    pipeline = Latents(files, RunSettings(step_cache=replace(OPEN, threshold=100.0)))
    latent_of(pipeline, replace(REQUEST, guidance_high=3.0, boundary=0.9, shift=5.0))
    assert pipeline.low is not None and pipeline.low.step_cache is not None
    high, low = skipped(pipeline), pipeline.low.step_cache.reading().passes
    first = low[0][0]
    assert 0 < first < STEPS and low[0] == (first, 2, 0) and low[1] == (first + 1, 2, 2)
    assert high == list(range(1, first))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["first_block", "teacache", "magcache"])
@pytest.mark.parametrize("stop", [3, 6, 9])
def test_a_stopped_run_goes_on_to_the_same_bits(files: tiny.WanFiles, tmp_path: Path, method: str, stop: int) -> None:
    """What a skipped step adds is made again by the step that left it."""
    table = tmp_path / "table.json"
    TABLE.save(table)
    one = replace(files, model_low=None)
    thresholds = {"first_block": 0.3, "teacache": 2.0, "magcache": 0.03}
    cache = StepCacheSettings(method, thresholds[method], 0.0, 1.0, table=str(table))
    whole = Latents(one, RunSettings(step_cache=cache))
    want, steps = latent_of(whole), skipped(whole)
    assert 3 <= len(steps) <= STEPS - 3, steps

    class StopsAt(Latents):
        def _at_step(self, step: int, num_steps: int) -> None:
            if step == stop:
                raise Stopped
            super()._at_step(step, num_steps)

    settings = RunSettings(step_cache=cache)
    with pytest.raises(Stopped):
        list(StopsAt(one, settings, runs=tmp_path / "runs").generate(REQUEST))
    again = Latents(one, settings, runs=tmp_path / "runs")
    assert latent_of(again).equal(want)
    assert again.steps is not None


def test_two_experts_go_on_to_the_same_bits(files: tiny.WanFiles, tmp_path: Path) -> None:
    request = replace(REQUEST, guidance_high=3.0, boundary=0.8, shift=5.0)
    want = make(files, OPEN, request)
    for stop in (4, 8, 10):

        class StopsAt(Latents):
            def _at_step(self, step: int, num_steps: int, stop: int = stop) -> None:
                if step == stop:
                    raise Stopped
                super()._at_step(step, num_steps)

        settings, runs = RunSettings(step_cache=OPEN), tmp_path / str(stop)
        with pytest.raises(Stopped):
            list(StopsAt(files, settings, runs=runs).generate(request))
        assert latent_of(Latents(files, settings, runs=runs), request).equal(want)


def test_first_needed() -> None:
    def calls(*made: tuple[int, ...]) -> list[Tensor]:
        return [torch.tensor([float(len(each)), *map(float, each)]) for each in made]

    assert first_needed(calls((0, 0), (1, 0), (1, 1))) == 0
    assert first_needed(calls((0, 0), (0, 0), (1, 0), (1, 1))) == 1
    assert first_needed(calls((0, 0), (1, 1), (0, 0))) == 2
    assert first_needed(calls((0, 0), ())) == 2  # the other expert's turn
    assert first_needed(calls((), (0,), (1,))) == 1


def test_a_cache_is_part_of_a_run(files: tiny.WanFiles) -> None:
    models = [Latents(files, RunSettings(step_cache=cache)).high for cache in (None, OPEN, replace(OPEN, end=0.9))]
    assert "step_cache" not in models[0].arithmetic
    assert len({model.arithmetic.get("step_cache") for model in models}) == 3


def test_a_measured_pass_that_is_run_again_keeps_its_signals_change() -> None:
    """As after running out of memory; the same place in a later call has not changed."""
    changes: list[Change] = []
    measured = MeasuredPass(changes, 0)
    for place, signal, residual, times in ((0.0, 1.0, 1.0, 1), (0.1, 1.5, 3.0, 2), (0.1, 1.5, 3.0, 1)):
        measured.begin(place, allowed=True)
        for _ in range(times):
            assert not measured.reuse(torch.full((1, 2), signal))
        measured.residual = torch.full((1, 2), residual)
        measured.passed()
    found = [(each.place, each.signal, each.residual, each.ratio) for each in changes]
    assert found == [(0.1, 0.5, 2.0, 3.0), (0.1, 0.0, 0.0, 1.0)]


# --- calibration


def test_a_model_is_measured(files: tiny.WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against residuals that are taken from the blocks by hand."""
    model = tiny.save_wan(tmp_path / "wan.safetensors")
    words = ["calibrate", "--model", model, "--text-encoder", files.text_encoder, "--vae", files.vae, "--steps", 10]
    words += ["--prompt", "a red ball", "--width", 32, "--height", 32, "--frames", 5, "--device", "cpu", "--seed", 3]
    residuals: list[Tensor] = []
    inner = WanModel.run_blocks

    def watched(self: WanModel, state: Any, *more: Any) -> Any:
        before = state.x.clone()
        yield from inner(self, state, *more)
        residuals.append(state.x - before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanModel, "run_blocks", watched)
        assert main([str(word) for word in words]) == 0
    table = read_table(tmp_path / "wan.step_cache.json", fingerprint(model))
    assert "wan.step_cache.json: 10 steps of wan" in capsys.readouterr().out
    assert table.verified and table.teacache is not None and table.magcache is not None
    for ratios, made in ((table.magcache.cond, residuals[::2]), (table.magcache.uncond, residuals[1::2])):
        lengths = [residual.norm(dim=-1) for residual in made]
        want = [1.0, *(float((now / before).mean()) for before, now in itertools.pairwise(lengths))]
        assert ratios == pytest.approx(want, rel=1e-4)
    assert table.teacache.polynomial[-1] == 0 and table.teacache.threshold > 0
    cache = StepCacheSettings("magcache", table=str(tmp_path / "wan.step_cache.json"))
    assert "(measured of this file)" in StreamedWan(model, RunSettings(step_cache=cache)).arithmetic["step_cache"]


def test_a_polynomial_is_found_again() -> None:
    known = (3.0, -2.0, 1.0, 0.5, 0.0)
    points = np.linspace(0.02, 0.9, 19)
    changes = [Change(float(x), 0, float(x), float(np.polyval(known, x)), 1.0) for x in points]
    assert fit_teacache(changes).polynomial == pytest.approx(known, abs=1e-6)
    with pytest.raises(ValueError, match="too few for a polynomial: calibrate with 10 steps or more"):
        fit_teacache(changes[:4])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--steps", "5"], "a table of 5 steps: measure all runs with one number of steps, 10 or more"),
        (["--model-low", "x", "-o", "a.json"], "--output is one file, and two experts have a table each"),
    ],
)
def test_what_cannot_be_measured(
    files: tiny.WanFiles, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    words = ["calibrate", "--model", files.model, "--text-encoder", files.text_encoder, "--vae", files.vae, *more]
    assert main([*map(str, words), "--device", "cpu"]) == 2
    assert expected in capsys.readouterr().err
    assert main(["calibrate", "--model", "gone.safetensors"]) == 2  # before what is missing beside it is asked for
    assert "gone.safetensors: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--step-cache", "magcache"], StepCacheSettings("magcache")),
        (
            [
                "--step-cache",
                "teacache",
                "--step-cache-threshold",
                "0.2",
                "--step-cache-start",
                "0.3",
                "--step-cache-end",
                "0.8",
                "--step-cache-max-skips",
                "2",
                "--step-cache-table",
                "wan2.1_t2v_14B",
                "--step-cache-residuals",
                "ram",
            ],
            StepCacheSettings("teacache", 0.2, 0.3, 0.8, 2, "wan2.1_t2v_14B", "ram"),
        ),
    ],
)
def test_flags(words: list[str], expected: StepCacheSettings | None) -> None:
    options = make_parser().parse_args(["generate", "--model", "a", "--prompt", "b", "--device", "cpu", *words])
    assert settings_of(options).step_cache == expected


def test_details_without_the_flag_are_refused() -> None:
    words = ["generate", "--model", "a", "--prompt", "b", "--device", "cpu", "--step-cache-max-skips", "2"]
    with pytest.raises(ValueError, match="--step-cache-max-skips says nothing without --step-cache"):
        settings_of(make_parser().parse_args(words))


# --- tables


def test_published_tables_suit_their_models() -> None:
    tables = published_tables()
    t2v, i2v = WanConfig("t2v", 5120, 13824, 40, 40), WanConfig("i2v", 5120, 13824, 40, 40, in_channels=36)
    cases = {
        "wan2.1_t2v_1.3B": (WanConfig("t2v", 1536, 8960, 12, 30), "wan2.1_t2v_1.3B_bf16.safetensors"),
        "wan2.1_t2v_14B": (t2v, "wan2.1_t2v_14B_fp8.safetensors"),
        "wan2.2_t2v_A14B": (t2v, "wan2.2_t2v_high_noise_14B_fp8.safetensors"),
        "wan2.2_i2v_A14B": (i2v, "any.safetensors"),
        "wan2.1_i2v_480p": (replace(i2v, image_dim=1280), "wan2.1_i2v_480p_14B.safetensors"),
        "wan2.1_i2v_720p": (replace(i2v, image_dim=1280), "Wan2_1-I2V-14B-720P_fp8.safetensors"),
    }
    for name, (config, file) in cases.items():
        assert suitable(config, file) == name
        assert not tables[name].verified and "not verified here" in str(tables[name])
    assert set(cases) == set(tables)
    assert suitable(WanConfig("ti2v", 3072, 14336, 24, 30, in_channels=48, out_channels=48), "x") is None
    assert tables["wan2.1_t2v_14B"].teacache is not None
    assert tables["wan2.1_t2v_14B"].teacache.polynomial[0] == -5784.54975374
    for table in tables.values():
        assert table.magcache is not None and len(table.magcache.cond) == len(table.magcache.uncond)


def test_which_table_is_taken(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    config = WanConfig("t2v", 1536, 8960, 12, 30)
    auto = StepCacheSettings("teacache")
    assert choose_table(auto, config, path).name == "wan2.1_t2v_1.3B"
    assert choose_table(replace(auto, table="wan2.1_t2v_14B"), config, path).name == "wan2.1_t2v_14B"
    TABLE.save(own_table(path))
    assert own_table(path) == tmp_path / "wan.step_cache.json"
    assert choose_table(auto, config, path).name == "made up"
    with pytest.raises(ValueError, match=r"no file, nor one of wan2\.1_t2v_1\.3B"):
        choose_table(replace(auto, table="wan9"), config, path)
    own_table(path).write_bytes(b"damaged")
    assert choose_table(replace(auto, method="first_block"), config, path).name == path.name, "needs no table"
    own_table(path).unlink()
    with pytest.raises(ValueError, match="use first_block, or measure the model: lowvram-video calibrate"):
        choose_table(auto, tiny.CONFIGS["t2v"], path)
    with pytest.raises(ValueError, match=r"no teacache table is known for wan2\.2_t2v_A14B.*: use magcache or"):
        StepCache(replace(auto), choose_table(replace(auto, table="wan2.2_t2v_A14B"), config, path))


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    TABLE.save(path)
    assert read_table(path) == TABLE
    replace(TABLE, model="abc").save(path)
    assert read_table(path, "abc").verified and not read_table(path, "other").verified


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"format": 2}', '{"format": 1, "name": "x"}',
        '{"format": 1, "name": "x", "teacache": {"polynomial": [1], "threshold": 0.1}}',
        '{"format": 1, "name": "x", "teacache": {"polynomial": [1, 2], "threshold": -1}}',
        '{"format": 1, "name": "x", "teacache": {"polynomial": 5, "threshold": 1}}',
        '{"format": 1, "name": "x", "teacache": [1]}',
        '{"format": 1, "name": "x", "magcache": {"cond": [1, 0], "uncond": [1, 1], "threshold": 0.1}}',
        '{"format": 1, "name": "x", "magcache": {"cond": [1, "a"], "uncond": [1, 1], "threshold": 0.1}}',
    ],
)  # fmt: skip
def test_what_is_no_table_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(TableError, match=r"bad\.json is no table of a step cache .*lowvram-video calibrate"):
        read_table(path)
    with pytest.raises(TableError, match=r"gone\.json: No such file"):
        read_table(tmp_path / "gone.json")


def test_a_card_that_follows_keeps_what_blocks_added_in_the_dtype_that_it_computes_in() -> None:
    """A run that goes on in bf16 left fp16 because its numbers end."""
    cache = FollowedCache()
    cache.residual = torch.zeros(4, 8, dtype=torch.float16)
    assert cache.room((4, 8), torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16
    assert cache.residual is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "cache"}, "'cache' does not exist: use one of teacache, magcache, first_block"),
        ({"threshold": -1.0}, "threshold of the step cache is -1.0: use a number from 0 up"),
        ({"threshold": math.nan}, "threshold of the step cache is nan"),
        ({"start": -0.1}, "start_percent of the step cache is -0.1"),
        ({"end": 2.0}, "end_percent of the step cache is 2.0"),
        ({"start": 0.5, "end": 0.5}, "begin before the end"),
        ({"max_skips": -1}, "max_skips of the step cache is -1"),
        ({"residuals": "disk"}, "'disk': use one of auto, vram, ram"),
    ],
)
def test_settings_are_checked(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        StepCacheSettings(**values)  # type: ignore[arg-type]


# SHA-256 of the polynomial, highest power first, and MagCache's ratios, prompt and negative in turn, as JSON: made of
# what TeaCache4Wan2.1 and ComfyUI-WanVideoWrapper have.
SOURCES = {
    "wan2.1_t2v_1.3B": "8f466392e838794e",
    "wan2.1_t2v_14B": "73b57070a0f10433",
    "wan2.1_i2v_480p": "6d9a1d44320ce784",
    "wan2.1_i2v_720p": "f6b77c91a64b652f",
    "wan2.2_t2v_A14B": "06d76abc400d2e65",
    "wan2.2_i2v_A14B": "d8a18cb1261e53a9",
}


def test_published_numbers_are_those_of_the_sources() -> None:
    tables = published_tables()
    table = tables["wan2.1_t2v_14B"].magcache
    assert table is not None
    assert table.cond[:3] == (1.0, 1.02504, 1.00025) and table.uncond[-1] == 0.86189
    digests = {}
    for name, each in tables.items():
        assert each.magcache is not None
        numbers = list(each.teacache.polynomial) if each.teacache is not None else []
        numbers += [ratio for both in zip(each.magcache.cond, each.magcache.uncond, strict=True) for ratio in both]
        digests[name] = hashlib.sha256(json.dumps([*map(float, numbers)]).encode()).hexdigest()[:16]
    assert digests == SOURCES
    assert json.loads(TABLE.to_json())["format"] == 1
