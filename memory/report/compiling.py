"""What torch.compile did in a run, as lines of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...system.sizes import in_gib


class CompileCounts(Protocol):
    """See `compilation/counts.py: Counts`."""

    @property
    def graphs(self) -> int: ...
    @property
    def breaks(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def bypasses(self) -> int: ...


class CompileReading(Protocol):
    """One model's in a run: see `compilation/reading.py: CompileReading`."""

    @property
    def label(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def counts(self) -> CompileCounts: ...
    @property
    def again(self) -> tuple[str, ...]: ...
    @property
    def vram_before(self) -> int: ...
    @property
    def vram_after(self) -> int: ...
    @property
    def saved_bytes(self) -> int: ...
    @property
    def pass_seconds(self) -> float | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def regressions(self) -> tuple[str, ...]: ...
    @property
    def plain(self) -> str: ...
    @property
    def unmade(self) -> tuple[str, ...]: ...


def lines(readings: Sequence[CompileReading]) -> list[str]:
    """Some lines for each model that ran compiled."""
    return [line for reading in readings for line in _lines(reading)]


def _lines(reading: CompileReading) -> list[str]:
    counts = reading.counts
    found = [f"torch.compile: {reading.label}"]
    made = f"{counts.graphs} graphs in {reading.seconds:.1f} s, {counts.breaks} breaks, {len(reading.again)} recompiles"
    fits = "" if reading.plain else ": that of the last run fits"
    found.append(made if counts.graphs else f"no code was made{fits}")
    if counts.hits or counts.misses or counts.bypasses:
        saved = f"; {in_gib(reading.saved_bytes)} of code from earlier starts" if reading.saved_bytes else ""
        bypassed = f", {counts.bypasses} not cacheable" if counts.bypasses else ""
        found.append(f"code cache: {counts.hits} hits, {counts.misses} misses{bypassed}{saved}")
    if reading.vram_after:
        found.append(
            f"VRAM in use {in_gib(reading.vram_before)} before code was made, {in_gib(reading.vram_after)} after"
        )
    found += [f"recompiled, {reason}" for reason in dict.fromkeys(reading.again)]
    found += [f"not all compiled: {reading.plain}"] if reading.plain else []
    found += [f"not compiled, {reason}" for reason in reading.unmade]
    found += [f"corrected: {note}" for note in reading.notes]
    return found + [f"worse than before: {words}" for words in reading.regressions]
