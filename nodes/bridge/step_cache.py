"""Step caches in a ComfyUI run: which prompts a pass is of, where it is in the schedule, and whose cache skips it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from ...sampling.caching.moments import Moment, moment_of
from ...sampling.caching.sampler_steps import Call

EASYCACHE = "easycache"  # in the transformer options, of core's EasyCache and LazyCache


def check_no_other(model_options: Mapping[str, Any]) -> None:
    """ValueError where core's step cache is on the MODEL too: both would skip, each unaware of what the other did."""
    if EASYCACHE in model_options.get("transformer_options", {}):
        raise ValueError(
            "EasyCache or LazyCache is on this MODEL, and so is Step Cache (Low VRAM): each would skip steps without "
            "knowing of the other's; take one of the two nodes out"
        )


def prompts_of(options: Mapping[str, Any], batch: int) -> tuple[tuple[int, Hashable], ...]:
    """What tells the samples of a pass from others of the step: kind, prompt, window and place in the batch.

    () where a node calls the model in a way of its own, and nobody knows which prompts there are.
    """
    kinds, names = options.get("cond_or_uncond"), options.get("uuids")
    if not kinds or not names or len(kinds) != len(names) or batch % len(kinds):
        return ()
    window = tuple(getattr(options.get("context_window"), "index_list", ()))
    each = batch // len(kinds)
    return tuple(
        (int(bool(kind)), (name, window, index))
        for kind, name in zip(kinds, names, strict=True)
        for index in range(each)
    )


def moment_in(call: Call, sampling: Any) -> Moment:
    """Where in the schedule a sampler's call is, by what core tells of the model's `sampling`."""
    shift = getattr(sampling, "shift", None)
    known = float(shift) if isinstance(shift, int | float) and call.levels[0] <= 1.0 else None
    return moment_of(call.levels, call.level, known)
