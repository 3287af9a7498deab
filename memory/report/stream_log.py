"""How blocks travelled: totals of a whole run, and its last passes stream by stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...system.sizes import in_gb, in_gib
from ..stream.streams import Span
from .intervals import Interval, intersect, length, split, subtract

KEPT_PASSES = 8


@dataclass(frozen=True)
class StreamReport:
    """How the blocks travelled. `overlap_percent` of the copying happened behind compute; in `stall_ms_per_pass` of a
    pass the device had nothing to compute while a copy ran."""

    bytes_streamed: int
    num_passes: int
    copy_seconds: float
    gbps: float
    overlap_percent: float
    stall_ms_per_pass: float


@dataclass(frozen=True)
class ParkedReport:
    """Blocks that lay in another card's memory: what RAM was spared, and how fast they and the others came.

    A rate is 0 where nothing came so.
    """

    card: str
    num_blocks: int
    parked_bytes: int
    bytes_streamed: int
    gbps: float
    other_gbps: float

    def line(self) -> str:
        """What it saved, and whether it was faster."""
        blocks = "1 block" if self.num_blocks == 1 else f"{self.num_blocks} blocks"
        told = f"parked on {self.card}: {blocks}, {in_gib(self.parked_bytes)} of RAM spared"
        if not self.gbps:
            return told
        told += f"; {in_gb(self.bytes_streamed, decimals=1)} came at {self.gbps:.1f} GB/s"
        if not self.other_gbps:
            return told
        word = "faster" if self.gbps > self.other_gbps else "slower"
        return f"{told}, {word} than the others ({self.other_gbps:.1f} GB/s)"


@dataclass(frozen=True)
class CopyTimes:
    """Seconds: of copying, of copying with no compute beside it, and of the latter within a pass."""

    copying: float = 0.0
    exposed: float = 0.0
    stalled: float = 0.0

    @classmethod
    def of(cls, copies: Sequence[Interval], computes: Sequence[Interval], passes: Sequence[Interval]) -> CopyTimes:
        """From what each stream did when; copies between passes are nobody's stall."""
        exposed = subtract(copies, computes)
        return cls(length(copies), length(exposed), length(intersect(exposed, passes)))

    def __add__(self, other: CopyTimes) -> CopyTimes:
        return CopyTimes(self.copying + other.copying, self.exposed + other.exposed, self.stalled + other.stalled)

    def report(self, num_passes: int, bytes_streamed: int) -> StreamReport:
        """The figures that are shown."""
        return StreamReport(
            bytes_streamed=bytes_streamed,
            num_passes=num_passes,
            copy_seconds=self.copying,
            gbps=bytes_streamed / self.copying / 1e9 if self.copying else 0.0,
            overlap_percent=100.0 * (1 - self.exposed / self.copying) if self.copying else 100.0,
            stall_ms_per_pass=1e3 * self.stalled / num_passes if num_passes else 0.0,
        )


class StreamLog:
    """Takes the spans of timed streams (`add`), in the order of each stream.

    Totals are of all of them; `copies`, `stalls` and `passes` are those of the last passes, however long a run is. A
    pass runs from its first block to its last.
    """

    def __init__(self) -> None:
        self.copies: list[Interval] = []
        self.stalls: list[Interval] = []
        self.passes: list[Interval] = []
        self._last_place = -1
        self._num_passes = self._bytes_streamed = 0
        self._before = CopyTimes()  # of what is no longer kept
        self._of_place: dict[int, tuple[int, float]] = {}  # bytes and seconds of what was copied there

    @property
    def computes(self) -> list[Interval]:
        """All of a pass but its stalls: resident blocks and what comes between blocks are not noted."""
        return subtract(self.passes, self.stalls)

    def add(self, spans: Sequence[Span]) -> None:
        """Count these in."""
        for span in spans:
            interval = span.begin, span.end
            if span.kind == "copy":
                self.copies.append(interval)
                self._bytes_streamed += span.nbytes
                nbytes, seconds = self._of_place.get(span.place, (0, 0.0))
                self._of_place[span.place] = nbytes + span.nbytes, seconds + span.end - span.begin
                continue
            if span.kind == "stall":  # the first thing noted of a block
                self.stalls.append(interval)
                if span.place <= self._last_place or not self.passes:
                    self._begin_pass(interval)
                self._last_place = span.place
            if self.passes:
                self.passes[-1] = self.passes[-1][0], span.end

    def report(self) -> StreamReport | None:
        """Figures of all that was streamed; None where nothing was."""
        if not self._num_passes and not self.copies:
            return None
        times = self._before + CopyTimes.of(self.copies, self.computes, self.passes)
        return times.report(self._num_passes, self._bytes_streamed)

    def copied(self, places: Collection[int]) -> tuple[int, float]:
        """Bytes that were copied to these places of a pass, and their GB/s; 0 where nothing was."""
        found = [copied for place, copied in self._of_place.items() if place in places]
        nbytes, seconds = sum(nbytes for nbytes, _ in found), sum(seconds for _, seconds in found)
        return nbytes, nbytes / seconds / 1e9 if seconds else 0.0

    def parked(self, card: str, num_blocks: int, parked_bytes: int, places: Collection[int]) -> ParkedReport:
        """What is told of blocks that lay on a card, and were copied to these places."""
        nbytes, gbps = self.copied(places)
        _, other_gbps = self.copied(set(self._of_place) - set(places))
        return ParkedReport(card, num_blocks, parked_bytes, nbytes, gbps, other_gbps)

    def _begin_pass(self, first: Interval) -> None:
        if len(self.passes) == 2 * KEPT_PASSES:
            self._forget_before(self.passes[KEPT_PASSES][0])
        self.passes.append(first)
        self._num_passes += 1

    def _forget_before(self, moment: float) -> None:
        """Keep of what was before only the sum; a copy of a later pass does not begin so early."""
        old_copies, self.copies = split(self.copies, moment)
        old_stalls, self.stalls = split(self.stalls, moment)
        old_passes, self.passes = split(self.passes, moment)
        self._before += CopyTimes.of(old_copies, subtract(old_passes, old_stalls), old_passes)
