"""Which passes of one prompt are computed, and what the last computed one added."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .residual import MakeRoom, Residual
from .rules import Rule


class PassCache(Residual):
    """A `BlockCache` (see `transformer/block_cache.py`) that decides by a rule.

    Each prompt needs one: signals and residuals differ. Say by `begin` where a pass is; however often that pass is run
    (out of memory, a solver that calls again), it is decided once. At most `max_skips` in a row are skipped (0: any
    number).
    """

    def __init__(self, rule: Rule, threshold: float, max_skips: int = 0, make_room: MakeRoom = torch.empty) -> None:
        super().__init__(make_room)
        self.rule, self.threshold, self.max_skips = rule, threshold, max_skips
        self.reset()

    @property
    def probes(self) -> bool:
        return self.rule.probes

    def reset(self) -> None:
        """Forget everything."""
        self.residual = None
        self._place, self._allowed = 0.0, False
        self._forced: bool | None = None
        self._decided: float | None = None  # the place that `reused` is of
        self._skips = 0
        self.reused = False  # what was decided last
        self.rule.reset()

    def begin(self, place: float, allowed: bool, forced: bool | None = None) -> None:
        """The next pass is here in the schedule, perhaps once more; one that is not `allowed` to is not skipped.

        `forced` is what was decided of it in another process.
        """
        self._place, self._allowed, self._forced = place, allowed, forced

    def reuse(self, signal: Tensor) -> bool:
        """Whether to add `residual` instead. Reads one number back from the device, where a signal is compared."""
        if self._place == self._decided and (self.residual is not None or not self.reused):
            return self.reused
        error = math.inf
        if self.residual is not None and self._may_skip:
            error = self.rule.estimate(signal, self._place)
        # not a number compares False, and is computed; a polynomial may be below 0
        reuse = error < self.threshold > 0 if self._forced is None else self._forced and self.residual is not None
        self.rule.settle(signal, self._place, error if reuse else None)
        self._skips = self._skips + 1 if reuse else 0
        self._decided, self.reused = self._place, reuse
        return reuse

    @property
    def _may_skip(self) -> bool:
        if self._forced is not None:
            return True
        return self._allowed and not (self.max_skips and self._skips >= self.max_skips)
