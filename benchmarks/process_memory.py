"""The RAM of another process by what it is made of, watched while it works: /proc of Linux, elsewhere RSS alone."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

GIB = 2**30
LOOK_SECONDS, PHASE_SECONDS, MAP_SECONDS = 0.02, 0.1, 0.25
TRACE_SECONDS = 0.5
GROWTH_BYTES = 32 << 20  # of a phase's RSS that is worth another look at its mappings
ARENA_BYTES = 64 << 20  # glibc's arenas of threads are as large, and aligned to it
NUM_FILES = 8
SIZE_CLASSES = ((1 << 30, "from 1 GiB"), (64 << 20, "64 MiB to 1 GiB"), (1 << 20, "1 to 64 MiB"), (0, "below 1 MiB"))

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)$")


@dataclass(frozen=True)
class Memory:
    """Bytes of a process in RAM; without the parts, which are 0, where the system does not tell them."""

    rss_bytes: int = 0
    anonymous_bytes: int = 0
    file_bytes: int = 0
    shared_bytes: int = 0  # memory files: what some drivers pin, and shared mappings


def memory_of(process: psutil.Process) -> Memory:
    """What a process has in RAM now. NoSuchProcess where it has ended."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return Memory(process.memory_info().rss)
    values = {name: value for name, _, value in (line.partition(":") for line in text.splitlines())}
    if "VmRSS" not in values:  # a process that has ended, but is waited for
        raise psutil.NoSuchProcess(process.pid)
    parts = (int(values.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    anonymous, file, shared = parts
    return Memory(anonymous + file + shared, anonymous, file, shared)


def mappings_of(pid: int) -> dict[str, int]:
    """Bytes in RAM by kind of mapping and the largest files, the largest first; nothing where it is not told."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    kinds: Counter[str] = Counter()
    files: Counter[str] = Counter()
    kind, into = "", kinds
    for line in text.splitlines():
        if mapping := _MAPPING.match(line):
            start, stop, name = int(mapping[1], 16), int(mapping[2], 16), mapping[5].strip()
            into = files if name.startswith("/") else kinds
            kind = Path(name).name if into is files else name or _anonymous_kind(start, stop - start)
        elif line.startswith("Rss:"):
            into[kind] += int(line.split()[1]) * 1024
    shown = dict(files.most_common(NUM_FILES))
    kinds.update(shown)
    kinds["other files"] += sum(files.values()) - sum(shown.values())
    return {name: nbytes for name, nbytes in kinds.most_common() if nbytes}


def _anonymous_kind(start: int, nbytes: int) -> str:
    if start % ARENA_BYTES == 0 and nbytes <= ARENA_BYTES:
        return "allocator's arenas"
    return "anonymous, " + next(words for least, words in SIZE_CLASSES if nbytes >= least)


@dataclass
class Phase:
    """The highest RSS of a part of a run, what it is made of then, and about then of which mappings."""

    name: str
    peak: Memory = field(default_factory=Memory)
    mappings: dict[str, int] = field(default_factory=dict)
    mapped_bytes: int = 0  # the RSS when `mappings` was looked at

    def figures(self) -> dict[str, Any]:
        return {"phase": self.name, **asdict(self.peak), "mappings": self.mappings}


class RamWatch:
    """The memory of a process while the `with` block runs; `phase_of` tells which part of its work goes on.

    `trace` has the highest RSS of every half second, in GiB.
    """

    def __init__(self, process: psutil.Process, phase_of: Callable[[], str]):
        self.process, self.phase_of = process, phase_of
        self.phases: list[Phase] = []
        self.trace: list[float] = []

    def __enter__(self) -> RamWatch:
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._name = self.phase_of()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._look, self._follow)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def peak(self) -> Memory:
        """The memory when its RSS was the highest."""
        return max((phase.peak for phase in self.phases), key=lambda peak: peak.rss_bytes, default=Memory())

    def figures(self) -> dict[str, Any]:
        """The peak, the peaks of the phases, and the trace."""
        peak = self.peak
        return {
            "peak_rss_bytes": peak.rss_bytes,
            "peak_anonymous_bytes": max((phase.peak.anonymous_bytes for phase in self.phases), default=0),
            "phases": [phase.figures() for phase in self.phases],
            "rss_gib_per_half_second": self.trace,
        }

    def _follow(self) -> None:
        """A thread of its own: who is asked may be slow to answer."""
        while not self._ended.wait(PHASE_SECONDS):
            with contextlib.suppress(OSError):
                self._name = self.phase_of()

    def _look(self) -> None:
        mapped = -MAP_SECONDS
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            while not self._ended.wait(LOOK_SECONDS):
                memory, phase = memory_of(self.process), self._phase()
                if memory.rss_bytes > phase.peak.rss_bytes:
                    phase.peak = memory
                self._note(memory)
                now = time.monotonic() - self._began
                if now - mapped >= MAP_SECONDS and memory.rss_bytes >= phase.mapped_bytes + GROWTH_BYTES:
                    phase.mappings, phase.mapped_bytes = mappings_of(self.process.pid), memory.rss_bytes
                    mapped = now

    def _phase(self) -> Phase:
        if not self.phases or self.phases[-1].name != self._name:
            self.phases.append(Phase(self._name))
        return self.phases[-1]

    def _note(self, memory: Memory) -> None:
        index = int((time.monotonic() - self._began) / TRACE_SECONDS)
        self.trace += [0.0] * (index + 1 - len(self.trace))
        self.trace[index] = max(self.trace[index], round(memory.rss_bytes / GIB, 3))


def phase_lines(phases: list[dict[str, Any]], more_than: int = 32 << 20) -> list[str]:
    """A table of phases, with the mappings of the highest one."""
    lines = [f"    {'phase':<16}{'RSS':>9}{'anonymous':>11}{'files':>9}{'shared':>9}"]
    for phase in phases:
        cells = ((phase["rss_bytes"], 9), (phase["anonymous_bytes"], 11), (phase["file_bytes"], 9))
        line = "".join(f"{nbytes / GIB:>{width}.3f}" for nbytes, width in (*cells, (phase["shared_bytes"], 9)))
        lines.append(f"    {phase['phase']:<16}{line}")
    highest = max(phases, key=lambda phase: int(phase["rss_bytes"]))
    parts = (f"{name} {n / GIB:.3f}" for name, n in highest["mappings"].items() if n >= more_than)
    return [*lines, f"    of {highest['phase']}: {', '.join(parts)}"]
