"""The table of a step cache for a Wan model, measured of its own runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..sampling.caching.measure import MeasuringCache, fit_magcache, fit_teacache
from ..sampling.caching.settings import FIRST_BLOCK, StepCacheSettings
from ..sampling.caching.tables import CacheTable
from ..weights.files.fingerprint import fingerprint
from .pipeline import WanPipeline
from .request import WanRequest
from .streamed import StreamedWan

FEWEST_STEPS = 10


def calibrate(pipeline: WanPipeline, requests: Sequence[WanRequest]) -> dict[Path, CacheTable]:
    """By model file (two of Wan 2.2 A14B), the table that runs of these requests make; all of them have equal steps.

    ValueError for fewer than 10 steps.
    """
    completed = [request.completed(pipeline.defaults) for request in requests]
    steps = {len(pipeline.sigmas(request)) - 1 for request in completed}
    if len(steps) != 1 or min(steps) < FEWEST_STEPS:
        shown = ", ".join(map(str, sorted(steps)))
        raise ValueError(f"a table of {shown} steps: measure all runs with one number of steps, {FEWEST_STEPS} or more")
    measuring = {model: _measure(model) for model in pipeline.models}
    try:
        for request in requests:
            pipeline.denoise(request)
    finally:
        for model in pipeline.models:
            model.use_step_cache(pipeline.settings.step_cache)
    num_steps = steps.pop()
    return {model.checkpoint.path: _table(model, cache, num_steps) for model, cache in measuring.items()}


def _measure(model: StreamedWan) -> MeasuringCache:
    settings = StepCacheSettings(FIRST_BLOCK)  # of which nothing is asked
    cache = MeasuringCache(settings, CacheTable(model.checkpoint.path.name))
    model.step_cache = cache
    return cache


def _table(model: StreamedWan, cache: MeasuringCache, num_steps: int) -> CacheTable:
    path = model.checkpoint.path
    if not cache.changes:
        raise ValueError(f"{path.name} had no two steps in these runs: give more steps, or another boundary")
    table = CacheTable(path.stem, fit_teacache(cache.changes), fit_magcache(cache.changes, num_steps))
    return replace(table, model=fingerprint(path), verified=True)
