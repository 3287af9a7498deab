"""What a step cache's table is made of: how signals and residuals change from step to step of runs that skip none."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .pass_cache import PassCache
from .rules import ROWS_AT_ONCE, MagRule, TeaRule, copied, evaluate, relative_l1
from .settings import END, START
from .step_cache import Prompts, StepCache
from .tables import MAGCACHE_SKIPS, MagTable, TeaTable

DEGREE = 4  # of the polynomial, as published
SKIPPED_SHARE = 0.45  # of a run's steps at the usual threshold: about 1.7 times as fast


@dataclass(frozen=True)
class Change:
    """From the pass of the same prompt at the step before: the signal's relative one, the residual's, and by what
    factor the residual's rows became longer."""

    place: float
    kind: int  # 0 of a prompt, 1 of a negative one
    signal: float
    residual: float
    ratio: float


class SignalRule:
    """Lets no pass be skipped, and measures how the signal changed since the one before."""

    probes = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._signal: Tensor | None = None
        self._change = 0.0

    def estimate(self, signal: Tensor, place: float) -> float:
        return math.inf

    def settle(self, signal: Tensor, place: float, error: float | None) -> None:
        before = self._signal
        self._change = 0.0 if before is None or before.shape != signal.shape else relative_l1(signal, before)
        self._signal = copied(signal, before)

    def take(self) -> float:
        """The change, once: a pass at the same place again has none."""
        taken, self._change = self._change, 0.0
        return taken


class MeasuredPass(PassCache):
    """Computes every pass, and measures what changed: the last residual is kept beside the one that is made."""

    def __init__(self, changes: list[Change], kind: int) -> None:
        self._signal = SignalRule()
        super().__init__(self._signal, 0.0)
        self._changes, self._kind = changes, kind
        self._last: Tensor | None = None  # residual

    def passed(self) -> None:
        """A pass is over."""
        made, last, signal = self.residual, self._last, self._signal.take()
        if made is not None and last is not None and made.shape == last.shape:
            change = Change(self._place, self._kind, signal, relative_l1(made, last), length_ratio(made, last))
            self._changes.append(change)
        self._last, self.residual = made, None

    def forget_residuals(self) -> None:
        """Their memory is wanted: the next pass is compared with none."""
        self.residual = self._last = None


@dataclass
class MeasuringCache(StepCache):
    """In the place of a step cache: see `MeasuredPass`. A batch of several prompts is taken for one of the first."""

    changes: list[Change] = field(default_factory=list)
    _measured: dict[Hashable, MeasuredPass] = field(default_factory=dict)

    def begin_run(self) -> None:
        super().begin_run()
        self._measured = {}

    def of(self, prompts: Prompts) -> PassCache | None:
        if self._moment is None or not prompts:
            return None
        found = self._measured.setdefault(prompts, MeasuredPass(self.changes, prompts[0][0]))
        found.begin(self._moment.place, allowed=False)
        return found

    def done(self, prompts: Prompts, cache: PassCache) -> None:
        self._measured[prompts].passed()

    def forget_residuals(self) -> None:
        for each in self._measured.values():
            each.forget_residuals()


def fit_teacache(changes: Sequence[Change]) -> TeaTable:
    """The polynomial that makes the residual's change of the signal's, and the usual threshold.

    It has no constant: a signal that has not changed tells of no change. ValueError for too few steps.
    """
    signal, residual = (np.array([getattr(each, name) for each in changes]) for name in ("signal", "residual"))
    if len(np.unique(signal.round(6))) < 2 * DEGREE:
        raise ValueError(f"{len(changes)} changes are too few for a polynomial: calibrate with 10 steps or more")
    scale = signal.max()  # columns of one size, for the solver's sake
    columns = np.stack([(signal / scale) ** power for power in range(DEGREE, 0, -1)], axis=1)
    # relative errors: a step of a small change counts as much as one of a large
    weight = 1 / np.maximum(residual, residual.mean() / 10)
    solved = np.linalg.lstsq(columns * weight[:, None], residual * weight, rcond=None)[0]
    powers = range(DEGREE, 0, -1)
    polynomial = (*(float(value / scale**power) for value, power in zip(solved, powers, strict=True)), 0.0)
    by_place = _means(changes, "signal")
    signals = [1.0]
    for place in sorted(by_place):
        signals.append(signals[-1] * (1 + by_place[place]))
    made = [evaluate(polynomial, by_place[place]) for place in sorted(by_place)]
    most = sum(max(0.0, each) for each in made)

    def cache(threshold: float) -> PassCache:
        return PassCache(TeaRule(polynomial), threshold)

    return TeaTable(polynomial, _usual(cache, [0.0, *sorted(by_place)], signals, most))


def fit_magcache(changes: Sequence[Change], num_steps: int) -> MagTable:
    """The mean ratios at each step of so many, 1 where nothing was measured, and the usual threshold."""
    tables = []
    for kind in (0, 1):
        means = _means([each for each in changes if each.kind == kind], "ratio")
        at = {round(place * num_steps): ratio for place, ratio in means.items()}
        tables.append(tuple(at.get(step, 1.0) for step in range(num_steps)))
    cond, uncond = tables
    if all(ratio == 1.0 for ratio in uncond):
        uncond = cond

    def cache(threshold: float) -> PassCache:
        return PassCache(MagRule([cond, uncond]), threshold, MAGCACHE_SKIPS)

    places = [step / num_steps for step in range(num_steps)]
    return MagTable(cond, uncond, _usual(cache, places, [1.0] * num_steps, 2.0))


def length_ratio(residual: Tensor, previous: Tensor) -> float:
    """The mean over rows of the length of `residual [rows, dim]` over that of `previous`, in float32."""
    total = torch.zeros((), dtype=torch.float32, device=residual.device)
    for now, before in zip(residual.split(ROWS_AT_ONCE), previous.split(ROWS_AT_ONCE), strict=True):
        lengths = torch.linalg.vector_norm(before, dim=-1, dtype=torch.float32).clamp(min=1e-12)
        total += (torch.linalg.vector_norm(now, dim=-1, dtype=torch.float32) / lengths).sum()
    return float(total / len(residual))


def _means(changes: Sequence[Change], name: str) -> dict[float, float]:
    """By place, over all runs."""
    found: dict[float, list[float]] = {}
    for each in changes:
        found.setdefault(round(each.place, 6), []).append(getattr(each, name))
    return {place: sum(values) / len(values) for place, values in found.items()}


def _usual(
    cache: Callable[[float], PassCache], places: Sequence[float], signals: Sequence[float], most: float
) -> float:
    """The smallest of some thresholds with which a run skips its usual share."""
    for step in range(1, 81):
        threshold = most * 0.002 * 1.09**step
        tried = cache(threshold)
        skipped = 0
        for place, signal in zip(places, signals, strict=True):
            tried.begin(place, START <= place <= END and place < places[-1])
            skipped += tried.reuse(torch.full((1, 1), signal))
            tried.residual = torch.zeros(1, 1)
        if skipped >= SKIPPED_SHARE * len(places):
            break
    return float(f"{threshold:.3g}")
