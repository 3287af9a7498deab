"""The error bound that a run steers to: how much of each layer is left out follows from what was measured of it.

A layer begins at the careful end. Each call that is within the bound lets it leave out a little more, up to what was
asked for. One that is over it makes the layer exact in its next call; it returns keeping more, and never keeps less
again. Over the bound at the careful end, or where a result is no number, it is exact for the rest of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .readings import Sums
from .settings import SparseSettings

AIM = 0.8  # of the bound
# How far one call moves a layer for the logarithm of its error, and the limits of that. The way back up is bounded
# from below, so that excesses of a layer are few: as many as fit between what was asked for and the careful end.
GAIN, DOWN, AT_LEAST_UP, UP = 0.7, 0.5, 0.5, 1.5
MEMORY = 0.5  # what measurements of the step before still count
LEAST_TAU, MOST_KEPT = -1.0, 0.9  # the careful end


@dataclass
class Layer:
    """`slack` is how far under the asked tau (or over the asked share, as a power of e) a layer runs.

    It is `least` or more. `excess` is the error over the bound that makes it exact in its next call, else 0.
    """

    slack: float = 0.0
    dense: bool = False  # for the rest of the run
    seen: Sums = field(default_factory=Sums)
    excess: float = 0.0
    least: float = 0.0


class Bound:
    """The layers of one run."""

    def __init__(self, settings: SparseSettings, num_layers: int) -> None:
        self.settings = settings
        self.most = (
            math.log(max(1.0, MOST_KEPT / settings.top_k)) if settings.top_k else max(0.0, settings.tau - LEAST_TAU)
        )
        start = self.most if settings.bound is not None else 0.0
        self.layers = [Layer(start, dense=settings.bound == 0) for _ in range(num_layers)]

    def chosen(self, layer: int) -> tuple[float, float] | None:
        """(tau, top-k) of a layer; None where it is exact."""
        state, settings = self.layers[layer], self.settings
        if state.dense or state.excess:
            return None
        if settings.top_k:
            return settings.tau, min(max(MOST_KEPT, settings.top_k), settings.top_k * math.exp(state.slack))
        return settings.tau - state.slack, 0.0

    def learn(self, layer: int, passes: Sequence[Sums], told_exact: bool = False) -> None:
        """Take in what the passes of one call measured of a layer while it was sparse, or that it was to be exact."""
        state, bound = self.layers[layer], self.settings.bound
        worst = max((each.error for each in passes if each.error is not None), default=None)
        if not bound or state.dense:
            return
        if state.excess:
            if told_exact:
                self._return(layer, bound)
        elif worst is None:
            return
        elif not math.isfinite(worst) or (worst > bound and state.slack >= self.most):
            state.dense = True
        elif worst > bound:
            state.excess = worst
        else:
            self._let_go(state, passes, bound)

    def _return(self, layer: int, bound: float) -> None:
        state = self.layers[layer]
        wanted = GAIN * math.log(state.excess / (AIM * bound))
        slack = min(self.most, state.slack + min(UP, max(AT_LEAST_UP, wanted)))
        self.layers[layer] = Layer(slack, least=slack)

    def _let_go(self, state: Layer, passes: Sequence[Sums], bound: float) -> None:
        kept = Sums(MEMORY * state.seen.difference, MEMORY * state.seen.norm)
        for each in passes:
            kept.add(Sums(each.difference, each.norm))
        state.seen = kept
        wanted = GAIN * math.log(max(kept.error or 0.0, 1e-9) / (AIM * bound))
        state.slack = min(self.most, max(state.least, state.slack + max(-DOWN, wanted)))

    # A run that goes on begins with what it had learnt

    def state(self) -> Tensor:
        """`[layers, 6]`, fp64."""
        rows = [
            [each.slack, float(each.dense), each.seen.difference, each.seen.norm, each.excess, each.least]
            for each in self.layers
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """The reverse of `state`, as numbers; runs that were kept before a layer could be over have four columns."""
        for layer, (slack, dense, difference, norm, *later) in enumerate(state):
            excess, least = later or (0.0, 0.0)
            self.layers[layer] = Layer(slack, bool(dense), Sums(difference, norm), excess, least)
