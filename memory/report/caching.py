"""What step caches skipped, as lines of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...system.sizes import in_gib


class CacheReading(Protocol):
    """One model's in a run: see `sampling/caching/step_cache.py: CacheReading`."""

    @property
    def label(self) -> str: ...
    @property
    def passes(self) -> tuple[tuple[int, int, int], ...]: ...
    @property
    def residual_bytes(self) -> int: ...
    @property
    def in_ram(self) -> bool: ...
    @property
    def off(self) -> str: ...


def lines(readings: Sequence[CacheReading]) -> list[str]:
    """Two lines for each model that ran: how steps were skipped, and which."""
    return [line for reading in readings for line in _lines(reading)]


def _lines(reading: CacheReading) -> list[str]:
    if reading.off:
        return [f"step cache: {reading.off}"]
    skips = {step: skips for step, _, skips in reading.passes if skips}
    whole = [step for step, passes, skips in reading.passes if skips == passes]
    num_passes = sum(passes for _, passes, _ in reading.passes)
    which = f" (steps {', '.join(str(step + 1) for step in skips)})" if skips else ""
    kept = f"; residuals {in_gib(reading.residual_bytes)} in {'RAM' if reading.in_ram else 'VRAM'}" if skips else ""
    counts = f"skipped {len(whole)} of {len(reading.passes)} steps, {sum(skips.values())} of {num_passes} passes"
    return [f"step cache: {reading.label}", f"{counts}{which}{kept}"]
