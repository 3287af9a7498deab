"""The flags of step caches."""

from __future__ import annotations

import argparse

from ..sampling.caching.settings import AUTO, END, FIRST_BLOCK, METHODS, PLACES, START, StepCacheSettings
from .flags import has

DETAILS = (
    "step_cache_threshold",
    "step_cache_start",
    "step_cache_end",
    "step_cache_max_skips",
    "step_cache_table",
    "step_cache_residuals",
)


def add_step_cache(parser: argparse.ArgumentParser) -> None:
    """The flags that `step_cache_of` reads."""
    group = parser.add_argument_group(
        "step cache (Wan; FramePack has --teacache): steps whose result would hardly change are skipped"
    )
    group.add_argument("--step-cache", choices=list(METHODS), help="how that is estimated; left out: off")
    group.add_argument(
        "--step-cache-threshold", type=float, metavar="CHANGE",
        help="estimated change that skipped steps may add up to: higher is faster (left out: the table's)",
    )  # fmt: skip
    group.add_argument("--step-cache-start", type=float, metavar="SHARE", help=f"first share of steps kept ({START})")
    group.add_argument("--step-cache-end", type=float, metavar="SHARE", help=f"no step is skipped after it ({END})")
    group.add_argument(
        "--step-cache-max-skips", type=int, metavar="STEPS", help="so many in a row at most (0: as the method allows)"
    )
    group.add_argument(
        "--step-cache-table", metavar="NAME",
        help="a published table such as wan2.1_t2v_14B, or a file of `calibrate` (auto: the model's)",
    )  # fmt: skip
    group.add_argument(
        "--step-cache-residuals", choices=list(PLACES), help="where what the blocks added is kept (auto: as planned)"
    )


def step_cache_of(options: argparse.Namespace) -> StepCacheSettings | None:
    """The settings of these flags; None where they leave the cache off. ValueError for details without it."""
    if not has(options, "step_cache", DETAILS, "teacache"):
        return None
    threshold, start, end, max_skips, table, residuals = (getattr(options, name) for name in DETAILS)
    if options.step_cache == FIRST_BLOCK and table is not None:
        raise ValueError(
            f"--step-cache-table says nothing with --step-cache {FIRST_BLOCK}, which needs no table: take it out, or "
            "give --step-cache teacache or --step-cache magcache"
        )
    return StepCacheSettings(
        options.step_cache,
        threshold,
        START if start is None else start,
        END if end is None else end,
        max_skips or 0,
        table or AUTO,
        residuals or AUTO,
    )
