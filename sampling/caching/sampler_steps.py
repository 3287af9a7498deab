"""Which step of a sampler's run a pass is of, where a host tells of noise levels that are on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .moments import step_of


@dataclass(frozen=True)
class Call:
    """A sampler's call of the model: the run's `levels`, its own one, the step, and which call of the run it is."""

    levels: Sequence[float]
    level: float
    step: int
    number: int


class SamplerSteps:
    """The calls of one run. All passes of a call are told with one tensor of noise levels.

    Reading a level waits for all that the device was given before. So it is not read where a sampler is seen to call
    the model once a step: who samples is told of each step (`done`), and what comes next is known.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A run begins: nothing is known of it."""
        self._tensors: tuple[Tensor, Tensor] | None = None  # held, so that no other one has their place in memory
        self._call: Call | None = None
        self._begin_levels()

    def _begin_levels(self) -> None:
        self._done, self._calls_since = -1, 0
        self._once_a_step = False  # as it was between the last two steps that were done
        self._ahead: int | None = None  # of the step that was done last: the step that was read next

    def done(self, step: int) -> None:
        """The sampler says that a step of the run is over."""
        self._once_a_step = self._done >= 0 and step == self._done + 1 and self._calls_since == 1
        self._done, self._calls_since = step, 0

    def at(self, levels: Tensor, level: Tensor) -> Call:
        """The call that a pass is of: `levels` of the run, the last of which is its end, and that of the pass."""
        before = self._call
        if before is not None and self._tensors is not None and self._tensors[1] is level:
            return before
        if before is not None and self._tensors is not None and self._tensors[0] is levels:
            known = before.levels
        else:
            known = levels.flatten().tolist()
            self._begin_levels()
        self._tensors = levels, level
        self._calls_since += 1
        step = self._next_step(len(known) - 1)
        if step is None:
            now = float(level.flatten()[0])
            step = step_of(known, now)
            self._ahead = step - self._done if self._calls_since == 1 and self._done >= 0 else None
        else:
            now = known[step]
        self._call = Call(known, now, step, 0 if before is None else before.number + 1)
        return self._call

    def _next_step(self, num_steps: int) -> int | None:
        """The step that comes next for sure; None where only the device knows."""
        if not self._once_a_step or self._calls_since != 1 or self._ahead is None:
            return None
        step = self._done + self._ahead
        return step if 0 <= step < num_steps else None
