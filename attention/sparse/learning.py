"""What a model's calls measured of each layer, and the bound that learns from it.

It is on its way from the device until somebody reads it: what a layer did in one call when the next comes to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .bound import Bound
from .readings import LayerReading, PassReadings, Sums, call_of, learnt_from, readings
from .settings import SparseSettings


class Learning:
    """Of one model's runs, one after the other. Callers take turns: it is locked by nobody here."""

    def __init__(self, settings: SparseSettings | None, num_layers: int) -> None:
        self._settings, self._num_layers = settings, num_layers
        self.bound = None if settings is None else Bound(settings, num_layers)
        self._pending: list[PassReadings] = []
        self._sums: dict[tuple[int, int, bool], Sums] = {}

    def begin_run(self) -> None:
        """Nothing is known of a run that begins; what was measured before it is to be read by now."""
        self.bound = None if self._settings is None else Bound(self._settings, self._num_layers)

    def add(self, done: PassReadings) -> None:
        """A pass is over, and all its layers are sent."""
        self._pending.append(done)

    def read(self, layers: Sequence[int], before: int) -> None:
        """What calls before this one measured of the layers."""
        ready = sorted((each for each in self._pending if each.call < before), key=_in_order)
        for _, group in itertools.groupby(ready, key=lambda each: each.call):
            passes = list(group)
            for layer in layers:
                self._read_call(layer, [each for each in passes if layer in each.unread])
        self._pending = [each for each in self._pending if each.unread]

    def _read_call(self, layer: int, passes: Sequence[PassReadings]) -> None:
        """What the passes of one call measured of a layer."""
        sums = [each.read(layer) for each in passes]
        for each, found in zip(passes, sums, strict=True):
            self._sums.setdefault((each.step, layer, each.sparse[layer]), Sums()).add(found)
        if self.bound is not None:
            measured = [found for each, found in zip(passes, sums, strict=True) if each.sparse[layer]]
            self.bound.learn(layer, measured, any(each.told_exact[layer] for each in passes))

    def readings(self) -> tuple[LayerReading, ...]:
        """What was read since it was last forgotten, by step and layer."""
        return readings({key: sums for key, sums in self._sums.items() if sums.passes})

    def forget_readings(self) -> None:
        """Another run is reported from here on."""
        self._pending, self._sums = [], {}

    def state(self, call: int) -> Tensor | None:
        """See `AttentionRun.state`; this is the call."""
        if self.bound is None:
            return None
        waiting = [each.unlearnt(each.call - call) for each in sorted(self._pending, key=_in_order)]
        learnt = self.bound.state()
        return torch.stack([learnt.to(waiting[0].device, non_blocking=True) if waiting else learnt, *waiting])

    def restore(self, state: Tensor) -> None:
        """Go on with what a run had learnt; what was measured here before is to be read by now."""
        if self.bound is None:
            return
        learnt, *waiting = (state if state.dim() == 3 else state[None]).tolist()
        self.bound.restore(learnt)
        for _, group in itertools.groupby(waiting, key=call_of):
            for layer, passes in enumerate(zip(*group, strict=True)):
                self.bound.learn(layer, *learnt_from(passes))


def _in_order(done: PassReadings) -> tuple[int, int]:
    return done.call, done.place
