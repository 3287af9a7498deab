"""How a step cache decides, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass

TEACACHE, MAGCACHE, FIRST_BLOCK = "teacache", "magcache", "first_block"
METHODS = (TEACACHE, MAGCACHE, FIRST_BLOCK)
AUTO = "auto"
PLACES = (AUTO, "vram", "ram")  # of residuals
FEW_STEPS = 8  # so many need every one of them
START, END = 0.15, 0.95
MOST_SKIPS = 100


@dataclass(frozen=True)
class StepCacheSettings:
    """What a pass of a run may skip: its blocks, where their result has hardly changed since they last ran.

    `threshold` is the estimated change that skipped passes may add up to (None: that of the table). Only passes between
    the shares `start` and `end` of the whole schedule are skipped, at most `max_skips` in a row (0: as many as the
    method allows). `table` is a published one by name, a file of `calibrate`, or the one that suits the model.
    `residuals` is where what the blocks added is kept: in VRAM, in RAM, or as the plan says.
    """

    method: str = TEACACHE
    threshold: float | None = None
    start: float = START
    end: float = END
    max_skips: int = 0
    table: str = AUTO
    residuals: str = AUTO

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"step cache {self.method!r} does not exist: use one of {', '.join(METHODS)}")
        if self.residuals not in PLACES:
            raise ValueError(f"residuals cannot be kept in {self.residuals!r}: use one of {', '.join(PLACES)}")
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(
                f"the threshold of the step cache is {self.threshold}: use a number from 0 up, such as 0.1 (0 computes "
                "every step)"
            )
        for name, value in (("start_percent", self.start), ("end_percent", self.end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} of the step cache is {value}: use a share of the steps from 0 to 1")
        if self.start >= self.end:
            raise ValueError(
                f"the step cache would begin at {self.start} and end at {self.end} of the steps: begin before the end"
            )
        if not 0 <= self.max_skips <= MOST_SKIPS:
            raise ValueError(
                f"max_skips of the step cache is {self.max_skips}: use 0 (as the method allows) to {MOST_SKIPS}"
            )
