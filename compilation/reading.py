"""What compiling did in a run, and what of it is worse than the last time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..system.sizes import in_gib
from .counts import NONE, Counts

SLOWER_PASS, SLOWER_CODE = 1.1, 1.5  # times the last run's
NOTICED_SECONDS = 1.0  # of compiling; less is no news


@dataclass(frozen=True)
class CompileReading:
    """One model's in a run.

    `seconds` of making code, `graphs` of `Counts`, `again` why functions were compiled anew, `plain` words on some that
    run as plain PyTorch since (empty: none), `unmade` why new code of them was wanted; VRAM in use before and after the
    first code was made, in bytes (0 on a CPU); `saved_bytes` of code came from earlier starts. `pass_seconds` is the
    median between passes (None: too few). `regressions` are words on what is worse than in the last run.
    """

    label: str
    seconds: float = 0.0
    counts: Counts = NONE
    again: tuple[str, ...] = ()
    vram_before: int = 0
    vram_after: int = 0
    saved_bytes: int = 0
    pass_seconds: float | None = None
    notes: tuple[str, ...] = ()
    regressions: tuple[str, ...] = ()
    plain: str = ""
    unmade: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Of the report."""
        counts = self.counts
        found = [f"torch.compile: {self.label}"]
        made = f"{counts.graphs} graphs in {self.seconds:.1f} s, {counts.breaks} breaks, {len(self.again)} recompiles"
        fits = "" if self.plain else ": that of the last run fits"
        found.append(made if counts.graphs else f"no code was made{fits}")
        if counts.hits or counts.misses or counts.bypasses:
            saved = f"; {in_gib(self.saved_bytes)} of code from earlier starts" if self.saved_bytes else ""
            bypassed = f", {counts.bypasses} not cacheable" if counts.bypasses else ""
            found.append(f"code cache: {counts.hits} hits, {counts.misses} misses{bypassed}{saved}")
        if self.vram_after:
            before, after = in_gib(self.vram_before), in_gib(self.vram_after)
            found.append(f"VRAM in use {before} before code was made, {after} after")
        found += [f"recompiled, {reason}" for reason in dict.fromkeys(self.again)]
        found += [f"not all compiled: {self.plain}"] if self.plain else []
        found += [f"not compiled, {reason}" for reason in self.unmade]
        found += [f"corrected: {note}" for note in self.notes]
        return found + [f"worse than before: {words}" for words in self.regressions]

    def figures(self, rows: int) -> dict[str, Any]:
        """What the next run is compared with."""
        return {
            "seconds": self.seconds,
            "rows": rows,
            "pass_seconds": self.pass_seconds,
            "again": len(self.again),
            **asdict(self.counts),
        }


def kept_figures(reading: CompileReading, rows: int, last: Mapping[str, Any]) -> dict[str, Any]:
    """What is remembered of a run for the next one: one that made no code leaves what `last` says of making it."""
    figures = reading.figures(rows)
    if not reading.counts.graphs:
        figures |= {name: last[name] for name in ("seconds", "again", *asdict(NONE)) if name in last}
    return figures


def regressions(now: Mapping[str, Any], last: Mapping[str, Any]) -> tuple[str, ...]:
    """Words on what of `now` is worse than `last`, both by `CompileReading.figures`; none for another or no last."""
    found = []
    if _grew(now, last, "seconds", SLOWER_CODE) and now["seconds"] - last["seconds"] > NOTICED_SECONDS:
        why = ": the code was not found in the cache" if now["misses"] > last.get("misses", 0) else ""
        found.append(f"compiling took {now['seconds']:.1f} s, {last['seconds']:.1f} s in the last run{why}")
    for name, what in (("again", "recompiles"), ("breaks", "graph breaks")):
        if isinstance(last.get(name), int) and now[name] > last[name]:
            found.append(f"{now[name]} {what}, {last[name]} in the last run")
    if now["rows"] == last.get("rows") and _grew(now, last, "pass_seconds", SLOWER_PASS):
        found.append(f"a pass takes {now['pass_seconds']:.2f} s, {last['pass_seconds']:.2f} s in the last run")
    return tuple(found)


def _grew(now: Mapping[str, Any], last: Mapping[str, Any], name: str, factor: float) -> bool:
    mine, other = now[name], last.get(name)
    return isinstance(mine, float) and isinstance(other, float) and mine > factor * other
