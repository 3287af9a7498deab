"""Where in its run, and in the whole schedule, a pass is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAME = 1e-4  # of a noise level: samplers hand it on in float32


@dataclass(frozen=True)
class Moment:
    """`place` of a pass in the whole schedule, 0 to 1, as is the `last` one of the run.

    `num_steps` are those of the whole schedule, of which a run may have a part; `step` counts the run's own.
    """

    place: float
    last: float
    num_steps: int
    step: int


def moment_of(levels: Sequence[float], level: float, shift: float | None = None) -> Moment:
    """The moment of a noise level `level` in a run over `levels`, the last of which is its end.

    `shift` bent the levels towards noise (see `flow_sigmas`): with it a run that is a part of a schedule, such as one
    of two samplers, is known as such. None: the run is all there is.
    """
    count, step = len(levels) - 1, step_of(levels, level)
    if shift is None or not shift > 0:
        return Moment(_between(levels, level, step) / count, (count - 1) / count, count, step)
    first, end = place_of(levels[0], shift), place_of(levels[-1], shift)
    whole = round(count / (end - first)) if end - first > 1 / (1000 * count) else count
    return Moment(place_of(level, shift), place_of(levels[-2], shift), max(whole, count), step)


def step_of(levels: Sequence[float], level: float) -> int:
    """The step that has begun at a noise level."""
    begun = sum(each >= level * (1 - SAME) for each in levels[:-1])
    return min(max(0, begun - 1), max(0, len(levels) - 2))


def place_of(level: float, shift: float) -> float:
    """The share of a schedule that is over at a noise level: 0 at 1, 1 at 0."""
    level = min(max(level, 0.0), 1.0)
    return 1.0 - level / (shift - (shift - 1.0) * level)


def _between(levels: Sequence[float], level: float, step: int) -> float:
    """The step with its fraction, for a level that lies between two steps."""
    high, low = levels[step], levels[step + 1]
    return step + (min(max((high - level) / (high - low), 0.0), 1.0) if high > low else 0.0)
