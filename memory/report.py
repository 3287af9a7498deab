"""What a run really used and how it spent its time, as JSON and as a table; and the monitor that watches it."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from ..whole_files import write_file
from .intervals import Interval, intersect, length, merge, subtract
from .lanes import Span

GIB = 2**30
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
class RunReport:
    """Everything shown after a run. `other_bytes` of the device belonged to other processes all along."""

    phases: tuple[PhaseReport, ...]
    samples: tuple[MemorySample, ...] = ()
    stream: StreamReport | None = None
    copies: tuple[Interval, ...] = ()
    computes: tuple[Interval, ...] = ()
    passes: tuple[Interval, ...] = ()
    pinned_bytes: int = 0
    other_bytes: int = 0
    budget_bytes: int | None = None

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

    def with_predictions(self, predicted: dict[str, int]) -> RunReport:
        """The same report beside the plan's peaks, in bytes by phase name."""
        phases = (replace(phase, predicted_bytes=predicted.get(phase.name)) for phase in self.phases)
        return replace(self, phases=tuple(phases))

    def with_stream(
        self, copies: Sequence[Interval], computes: Sequence[Interval], passes: Sequence[Interval], bytes_streamed: int
    ) -> RunReport:
        """The same report with what the streamer's lanes did; see `summarize_stream`."""
        return replace(
            self,
            stream=summarize_stream(copies, computes, passes, bytes_streamed),
            copies=tuple(copies),
            computes=tuple(computes),
            passes=tuple(passes),
        )

    def with_spans(self, spans: Sequence[Span], start_seconds: float) -> RunReport:
        """The same report with the spans of timed lanes that were made at `start_seconds` of the monitor's clock.

        Only streamed blocks are noted there, so all of a pass but its stalls counts as compute.
        """
        lanes: dict[str, list[Interval]] = {"copy": [], "compute": [], "stall": []}
        passes: list[Interval] = []
        last_block = -1
        for span in sorted(spans, key=lambda span: span.begin_ms):
            interval = start_seconds + span.begin_ms / 1e3, start_seconds + span.end_ms / 1e3
            lanes[span.lane].append(interval)
            if span.lane == "stall":  # the first thing noted of a block
                if span.block <= last_block or not passes:
                    passes.append(interval)
                last_block = span.block
            if span.lane != "copy" and passes:
                passes[-1] = passes[-1][0], interval[1]
        nbytes = sum(span.nbytes for span in spans)
        return self.with_stream(lanes["copy"], subtract(passes, lanes["stall"]), passes, nbytes)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunReport:
        """The inverse of `to_json`; ValueError where the text is not a report."""
        try:
            data = json.loads(text)
            stream = data["stream"]
            return cls(
                phases=tuple(PhaseReport(**phase) for phase in data["phases"]),
                samples=tuple(MemorySample(**sample) for sample in data["samples"]),
                stream=None if stream is None else StreamReport(**stream),
                copies=_intervals(data["copies"]),
                computes=_intervals(data["computes"]),
                passes=_intervals(data["passes"]),
                pinned_bytes=data["pinned_bytes"],
                other_bytes=data["other_bytes"],
                budget_bytes=data["budget_bytes"],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not the JSON of a run report ({error!r}): give one that a run saved") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON; a reader sees the old file or the whole new one."""
        write_file(Path(path), self.to_json().encode())

    def table(self) -> str:
        """The report as text, one line per phase."""
        lines = [
            f"{'phase':<10}{'seconds':>9}{'VRAM peak':>12}{'predicted':>12}{'off by':>9}"
            f"{'allocator':>12}{'RAM peak':>11}"
        ]
        for phase in self.phases:
            used, predicted = self.vram_bytes(phase), phase.predicted_bytes
            off = f"{100 * (used / predicted - 1):+.1f} %" if predicted else "-"
            lines.append(
                f"{phase.name:<10}{phase.seconds:>9.2f}{_gib(used):>12}{_gib(predicted):>12}{off:>9}"
                f"{_gib(phase.reserved_peak_bytes):>12}{_gib(phase.rss_peak_bytes):>11}"
            )
        if self.budget_bytes is not None:
            lines.append(f"budget {_gib(self.budget_bytes)}, used at most {_gib(self.vram_peak_bytes)}")
        if self.stream is not None:
            stream = self.stream
            lines.append(
                f"streamed {stream.bytes_streamed / 1e9:.1f} GB in {stream.num_passes} passes "
                f"at {stream.gbps:.1f} GB/s, "
                f"{stream.overlap_percent:.1f} % behind compute, stalled {stream.stall_ms_per_pass:.1f} ms per pass"
            )
        lines.append(f"pinned {_gib(self.pinned_bytes)}, RAM peak {_gib(self.rss_peak_bytes)}")
        return "\n".join(lines)


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
        self._period_seconds = period_seconds
        self._samples: list[MemorySample] = []
        self._phases: dict[str, PhaseReport] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._origin = time.perf_counter()
        self._open: str | None = None

    def __enter__(self) -> MemoryMonitor:
        self._origin = time.perf_counter()
        self._stop.clear()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="memory-monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()

    def now(self) -> float:
        """Seconds since the monitor was entered: the time base of all intervals in the report."""
        return time.perf_counter() - self._origin

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

    def report(self, pinned_bytes: int = 0, other_bytes: int = 0, budget_bytes: int | None = None) -> RunReport:
        """What was seen so far; the memory curve is thinned to its peaks."""
        with self._lock:
            return RunReport(
                phases=tuple(self._phases.values()),
                samples=_thin(self._samples, MAX_SAMPLES),
                pinned_bytes=pinned_bytes,
                other_bytes=other_bytes,
                budget_bytes=budget_bytes,
            )

    def _watch(self) -> None:
        while self.fault is None and not self._stop.wait(self._period_seconds):
            self._sample()

    def _sample(self) -> None:
        if self.fault is not None:
            return
        try:
            sample = MemorySample(self.now(), *self._read_device(), process_rss_bytes())
        except (RuntimeError, OSError) as error:  # a lost device or a closed /proc must not end the run
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


def others_bytes(device: torch.device, context_bytes: int) -> int:
    """VRAM that other processes hold: all that is in use but this process's allocations and its context."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device) - context_bytes)


def summarize_stream(
    copies: Sequence[Interval], computes: Sequence[Interval], passes: Sequence[Interval], bytes_streamed: int
) -> StreamReport:
    """Figures of the streaming from what each lane did when, in seconds on one clock.

    `computes` covers resident blocks too (or is `subtract(passes, stalls)` where only the waits were timed); `passes`
    runs from the first block to the last of each. Copies between passes are nobody's stall.
    """
    copied, computed = merge(copies), merge(computes)
    copy_seconds = length(copied)
    exposed = subtract(copied, computed)
    stalled = length(intersect(exposed, passes))
    return StreamReport(
        bytes_streamed=bytes_streamed,
        num_passes=len(passes),
        copy_seconds=copy_seconds,
        gbps=bytes_streamed / copy_seconds / 1e9 if copy_seconds else 0.0,
        overlap_percent=100.0 * (1 - length(exposed) / copy_seconds) if copy_seconds else 100.0,
        stall_ms_per_pass=1e3 * stalled / len(passes) if passes else 0.0,
    )


def process_rss_bytes() -> int:
    """RAM that this process holds (on macOS: held at most so far)."""
    if sys.platform == "win32":
        return _windows_working_set()
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _ProcessMemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows process status API (psapi.h)."""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
        ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
        ("PagefileUsage", ctypes.c_size_t),
        ("PeakPagefileUsage", ctypes.c_size_t),
    ]


if sys.platform == "win32":

    def _windows_working_set() -> int:
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        get_memory_info = kernel.K32GetProcessMemoryInfo
        get_memory_info.argtypes = [ctypes.c_void_p, ctypes.POINTER(_ProcessMemoryCounters), ctypes.c_uint32]
        counters = _ProcessMemoryCounters(cb=ctypes.sizeof(_ProcessMemoryCounters))
        if not get_memory_info(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
            raise ctypes.WinError(ctypes.get_last_error())
        return counters.WorkingSetSize


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


def _intervals(pairs: Sequence[Sequence[float]]) -> tuple[Interval, ...]:
    return tuple((start, end) for start, end in pairs)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f} GiB"
