"""The error bound that a run keeps: how much of each layer is left out follows from what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .readings import Sums
from .settings import SparseSettings

START = 0.5  # deviations under the tau that was asked for, where a bound is kept: nothing was measured yet
AIM = 0.8  # of the bound
# What is kept grows quickly where an error is too large, and shrinks slowly.
GAIN, DOWN, UP, AT_LEAST_UP = 0.7, 0.25, 1.5, 0.75
MEMORY = 0.5  # what measurements of the step before still count
LEAST_TAU, MOST_KEPT = -1.0, 0.9


@dataclass
class Layer:
    """`slack` is how far under the asked tau (or over the asked share, as a power of e) a layer runs."""

    slack: float = 0.0
    dense: bool = False  # for the rest of the run
    seen: Sums = field(default_factory=Sums)


class Bound:
    """The layers of one run."""

    def __init__(self, settings: SparseSettings, num_layers: int) -> None:
        self.settings = settings
        self.most = (
            math.log(max(1.0, MOST_KEPT / settings.top_k)) if settings.top_k else max(0.0, settings.tau - LEAST_TAU)
        )
        start = min(START, self.most) if settings.bound is not None else 0.0
        self.layers = [Layer(start, dense=settings.bound == 0) for _ in range(num_layers)]

    def chosen(self, layer: int) -> tuple[float, float] | None:
        """(tau, top-k) of a layer; None where it is dense."""
        state, settings = self.layers[layer], self.settings
        if state.dense:
            return None
        if settings.top_k:
            return settings.tau, min(max(MOST_KEPT, settings.top_k), settings.top_k * math.exp(state.slack))
        return settings.tau - state.slack, 0.0

    def learn(self, layer: int, sums: Sums) -> None:
        """Take in what was measured of a layer while it was sparse."""
        state, bound = self.layers[layer], self.settings.bound
        if not bound or state.dense or not sums.norm:
            return
        now = sums.error
        kept = Sums(MEMORY * state.seen.difference, MEMORY * state.seen.norm)
        kept.add(Sums(sums.difference, sums.norm))
        state.seen = kept
        error = kept.error
        if now is None or error is None or not math.isfinite(error):
            state.dense = True
            return
        if state.slack >= self.most and error > bound:
            state.dense = True
            return
        wanted = GAIN * math.log(max(error, 1e-9) / (AIM * bound))
        if error > bound:
            wanted = max(AT_LEAST_UP, wanted)
        state.slack = min(self.most, max(0.0, state.slack + min(UP, max(-DOWN, wanted))))

    # A run that goes on begins with what it had learnt

    def state(self) -> Tensor:
        """`[layers, 4]`, fp64."""
        rows = [[each.slack, float(each.dense), each.seen.difference, each.seen.norm] for each in self.layers]
        return torch.tensor(rows, dtype=torch.float64)

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """The reverse of `state`, as numbers."""
        for layer, (slack, dense, difference, norm) in zip(self.layers, state, strict=True):
            layer.slack, layer.dense, layer.seen = slack, bool(dense), Sums(difference, norm)
