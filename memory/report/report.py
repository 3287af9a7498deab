"""What a run really used and how it spent its time, as JSON and as a table; and the monitor that watches it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil
import torch

from ...system.atomic_files import write_file
from ...system.sizes import in_gb, in_gib
from .attention import LayerReading
from .attention import table as readings_table
from .intervals import Interval
from .stream_log import ParkedReport, StreamReport

MAX_SAMPLES = 2000


@dataclass(frozen=True)
class MemorySample:
    """One look at the memory: whole device in use, allocator's reserved part, this process's RAM, all in bytes."""

    seconds: float
    device_bytes: int
    reserved_bytes: int
    rss_bytes: int


@dataclass(frozen=True)
class PhaseReport:
    """One phase (encode, denoise, decode): how long it took and the peaks while it ran."""

    name: str
    start: float
    seconds: float
    device_peak_bytes: int
    reserved_peak_bytes: int
    rss_peak_bytes: int
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class CardReport:
    """Another card that shared the run's passes: its peaks, less what other processes had of it all along."""

    name: str
    vram_peak_bytes: int
    reserved_peak_bytes: int


class Reading(Protocol):
    """What something of one model did in a run, such as `sampling/caching/step_cache.py: CacheReading`."""

    def lines(self) -> list[str]:
        """It in words."""


@dataclass(frozen=True)
class RunReport:
    """Everything shown after a run.

    `other_bytes` of the device belonged to other processes all along; `copies`, `computes` and `passes` are of its last
    passes, `stream` is of all. `attention` tells what sparse or otherwise inexact self-attention did; of each model
    that ran `step_caches` tells which passes were skipped, `compiling` what torch.compile did. All of it is the first
    card's, where several shared the passes; `cards` are the others, `parked` those that only held blocks.
    """

    phases: tuple[PhaseReport, ...]
    samples: tuple[MemorySample, ...] = ()
    stream: StreamReport | None = None
    copies: tuple[Interval, ...] = ()
    computes: tuple[Interval, ...] = ()
    passes: tuple[Interval, ...] = ()
    pinned_bytes: int = 0
    other_bytes: int = 0
    budget_bytes: int | None = None
    attention: tuple[LayerReading, ...] = ()
    cards: tuple[CardReport, ...] = ()
    step_caches: tuple[Reading, ...] = ()
    parked: tuple[ParkedReport, ...] = ()
    compiling: tuple[Reading, ...] = ()

    @property
    def rss_peak_bytes(self) -> int:
        return max((phase.rss_peak_bytes for phase in self.phases), default=0)

    @property
    def vram_peak_bytes(self) -> int:
        """This process's peak over all phases, its context included."""
        return max((self.vram_bytes(phase) for phase in self.phases), default=0)

    def vram_bytes(self, phase: PhaseReport) -> int:
        """This process's peak in a phase, its context included."""
        return max(0, phase.device_peak_bytes - self.other_bytes)

    def save(self, path: str | Path) -> None:
        """Write the JSON; a reader sees the old file or the whole new one."""
        write_file(Path(path), json.dumps(asdict(self)).encode())

    def table(self) -> str:
        """The report as text, one line per phase, at most 66 characters wide; of RAM alone where no VRAM was used."""
        lines = [self._head(), *(self._line(phase) for phase in self.phases)]
        if self.budget_bytes is not None:
            lines.append(f"budget {_gib(self.budget_bytes)}, used at most {_gib(self.vram_peak_bytes)}")
        for card in self.cards:
            lines.append(
                f"{card.name} beside it: VRAM peak {_gib(card.vram_peak_bytes)}, "
                f"allocator {_gib(card.reserved_peak_bytes)}"
            )
        if self.stream is not None:
            stream = self.stream
            lines.append(
                f"streamed {in_gb(stream.bytes_streamed, decimals=1)} in {stream.num_passes} passes "
                f"at {stream.gbps:.1f} GB/s, "
                f"{stream.overlap_percent:.1f} % behind compute, stalled {stream.stall_ms_per_pass:.1f} ms per pass"
            )
        lines += [parked.line() for parked in self.parked]
        lines += readings_table(self.attention)
        for reading in (*self.step_caches, *self.compiling):
            lines += reading.lines()
        lines.append(f"pinned {_gib(self.pinned_bytes)}, RAM peak {_gib(self.rss_peak_bytes)}")
        return "\n".join(lines)

    @property
    def on_device(self) -> bool:
        """Whether any VRAM was used: none was where the run was on the processor."""
        return self.vram_peak_bytes > 0 or any(phase.predicted_bytes for phase in self.phases)

    def _head(self) -> str:
        vram = f"{'VRAM peak':>11}{'predicted':>11}{'off by':>8}{'reserved':>10}" if self.on_device else ""
        return f"{'phase':<8}{'seconds':>8}{vram}{'RAM peak':>10}"

    def _line(self, phase: PhaseReport) -> str:
        used, predicted, vram = self.vram_bytes(phase), phase.predicted_bytes, ""
        if self.on_device:
            off = f"{100 * (used / predicted - 1):+.1f} %" if predicted else "-"
            vram = f"{_gib(used):>11}{_gib(predicted):>11}{off:>8}{_gib(phase.reserved_peak_bytes):>10}"
        return f"{phase.name:<8}{phase.seconds:>8.2f}{vram}{_gib(phase.rss_peak_bytes):>10}"


class MemoryMonitor:
    """Watches the memory from a thread of its own while the `with` block runs.

        with MemoryMonitor(device) as monitor:
            with monitor.phase("denoise"):
                ...
        report = monitor.report()

    A phase entered again adds to the first. Reading goes on after an exception in the block; should reading itself
    fail, watching ends quietly and `fault` says why. `read_device` returns (device bytes in use, reserved bytes).
    """

    def __init__(
        self,
        device: torch.device | None = None,
        period_seconds: float = 0.01,
        read_device: Callable[[], tuple[int, int]] | None = None,
    ):
        self.fault: str | None = None
        self._read_device = read_device or _device_reader(device)
        self._process = psutil.Process()
        self._period_seconds = period_seconds
        self._samples: list[MemorySample] = []
        self._phases: dict[str, PhaseReport] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.origin = time.perf_counter()  # where the report's clock starts
        self._open: str | None = None

    def __enter__(self) -> MemoryMonitor:
        self.origin = time.perf_counter()
        self._stop.clear()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="memory-monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()

    def now(self) -> float:
        """Seconds since the monitor was entered: the clock of the report."""
        return time.perf_counter() - self.origin

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what runs inside; phases do not nest."""
        if self._open is not None:
            raise ValueError(f"phase {name!r} was begun inside phase {self._open!r}: end that one first")
        start = self.now()
        with self._lock:
            self._phases.setdefault(name, PhaseReport(name, start, 0.0, 0, 0, 0))
            self._open = name
        self._sample()
        try:
            yield
        finally:
            self._sample()
            with self._lock:
                self._open = None
                phase = self._phases[name]
                self._phases[name] = replace(phase, seconds=phase.seconds + self.now() - start)

    def report(self, predicted: Mapping[str, int] | None = None) -> RunReport:
        """What was seen so far, beside the peaks that were predicted, in bytes by phase name.

        The memory curve is thinned to its peaks.
        """
        predicted = predicted or {}
        with self._lock:
            return RunReport(
                tuple(replace(phase, predicted_bytes=predicted.get(name)) for name, phase in self._phases.items()),
                _thin(self._samples, MAX_SAMPLES),
            )

    def _watch(self) -> None:
        while self.fault is None and not self._stop.wait(self._period_seconds):
            self._sample()

    def _sample(self) -> None:
        if self.fault is not None:
            return
        try:
            sample = MemorySample(self.now(), *self._read_device(), self._process.memory_info().rss)
        except (RuntimeError, OSError, psutil.Error) as error:  # a lost device or a closed /proc must not end the run
            self.fault = f"{type(error).__name__}: {error}"
            return
        with self._lock:
            self._samples.append(sample)
            if len(self._samples) > 8 * MAX_SAMPLES:
                self._samples = list(_thin(self._samples, 4 * MAX_SAMPLES))
            if self._open is not None:
                phase = self._phases[self._open]
                self._phases[self._open] = replace(
                    phase,
                    device_peak_bytes=max(phase.device_peak_bytes, sample.device_bytes),
                    reserved_peak_bytes=max(phase.reserved_peak_bytes, sample.reserved_bytes),
                    rss_peak_bytes=max(phase.rss_peak_bytes, sample.rss_bytes),
                )


def card_report(name: str, samples: Sequence[MemorySample]) -> CardReport:
    """What was seen of a card; what it held outside PyTorch's allocator at the start is other processes'."""
    others = samples[0].device_bytes - samples[0].reserved_bytes if samples else 0
    return CardReport(
        name,
        max((sample.device_bytes for sample in samples), default=0) - others,
        max((sample.reserved_bytes for sample in samples), default=0),
    )


def outside_bytes(device: torch.device) -> int:
    """VRAM that PyTorch did not allocate here: other processes' and this one's context."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def _device_reader(device: torch.device | None) -> Callable[[], tuple[int, int]]:
    if device is None or device.type != "cuda":
        return lambda: (0, 0)

    def read() -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(device)
        return total - free, torch.cuda.memory_reserved(device)

    return read


def _thin(samples: Sequence[MemorySample], most: int) -> tuple[MemorySample, ...]:
    """At most `most` samples: of each run of neighbours the one with the most device memory."""
    run = -(-len(samples) // most)
    if run <= 1:
        return tuple(samples)
    runs = (samples[first : first + run] for first in range(0, len(samples), run))
    return tuple(max(neighbours, key=lambda sample: (sample.device_bytes, sample.rss_bytes)) for neighbours in runs)


def _gib(size: int | None) -> str:
    return "-" if size is None else in_gib(size)
