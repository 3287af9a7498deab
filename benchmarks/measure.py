"""What the benchmarks share: a second process that holds VRAM, a watch on memory, times, disk speed, dated results."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import torch
from lowvram_video.system.atomic_files import write_file

GIB = 2**30
RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 512 << 20  # more than any L2: read before each timing, so that nothing is timed out of a cache

C = TypeVar("C")


def bench_device() -> torch.device:
    """The first GPU, by its number as not all of torch.cuda takes one without; without a GPU the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


_HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()  # while nobody else has anything

def leave(left):
    held, size = [], int(free - left)
    while left > 0 and size > 2**21:
        take = min(size, 2**33) // 2**21 * 2**21
        held.append(torch.empty(take, dtype=torch.uint8, device="cuda"))
        size -= take
    return held

held = leave(float(sys.argv[1]) * 2**30)
print(torch.cuda.mem_get_info()[0], flush=True)
for line in sys.stdin:
    held = None
    torch.cuda.empty_cache()
    held = leave(float(line) * 2**30)
    print(free - sum(map(len, held)), flush=True)
"""


class Ballast:
    """Another process that holds all VRAM but `gib` (0: holds nothing); `free_bytes` is what it leaves to all others.

    A context of its own is part of what it holds, so what this process can use is really limited: context,
    libraries and fragmentation count.
    """

    def __init__(self, gib: float):
        self.gib = gib
        self.free_bytes = 0

    def __enter__(self) -> Ballast:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(self.gib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.free_bytes = int(self.process.stdout.readline())
        return self

    def leave(self, gib: float) -> int:
        """Hold all but `gib` (0: nothing) of what was free when it began, whatever others have of that by now.

        Returns the bytes that are left to all others.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{gib}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that holds VRAM could not leave {gib} GiB")
        return int(answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Watch:
    """Least free VRAM of the whole device and highest RSS of this process while the `with` block runs."""

    def __enter__(self) -> Watch:
        self.min_free = torch.cuda.mem_get_info()[0]
        self.rss_peak = psutil.Process().memory_info().rss
        self.running = True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while self.running:
            self.min_free = min(self.min_free, torch.cuda.mem_get_info()[0])
            self.rss_peak = max(self.rss_peak, psutil.Process().memory_info().rss)
            time.sleep(0.003)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.running = False
        self.thread.join()


def cold_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call on the device, caches cold; on a CPU that of a single one."""
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    flush = torch.zeros(CACHE_BYTES // 4, device=device)
    times = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()  # long enough, too, for the launch to be waiting when it ends
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times[3:])


def drop_page_cache(path: Path) -> None:
    """Make the next read of `path` come from the disk, as far as the system lets us."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_gbps(path: Path, megabytes: int = 4096) -> float:
    """What `dd` reads the file at, past the page cache, GB/s."""
    drop_page_cache(path)
    began = time.perf_counter()
    command = ["dd", f"if={path}", "of=/dev/null", "bs=16M", f"count={megabytes // 16}", "iflag=direct"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        subprocess.run(command[:-1], capture_output=True, check=True)
    size = min(path.stat().st_size, megabytes << 20)
    return size / (time.perf_counter() - began) / 1e9


def machine() -> dict[str, str]:
    """The machine in words."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def run_cases(
    what: str, cases: Iterable[C], run: Callable[[C], dict[str, Any]], **more: object
) -> tuple[list[dict[str, Any]], Path]:
    """What `run` finds for every case, and the file that it is written to after each: what was measured is kept."""
    results: list[dict[str, Any]] = []
    path = save_results(what, {**more, "cases": results})
    for case in cases:
        results.append(run(case))
        save_results(what, {**more, "cases": results})
    return results, path


def save_results(what: str, results: Mapping[str, object]) -> Path:
    """Write `results/<what>_<gpu or cpu>_<date>.json`; returns the path. RESULTS_DIR replaces the folder."""
    gpu = machine()["gpu"].lower().replace("nvidia ", "").replace(" ", "-").replace("none", "cpu")
    folder = Path(os.environ.get("RESULTS_DIR", RESULTS))
    path = folder / f"{what}_{gpu}_{datetime.date.today().isoformat()}.json"
    write_file(path, json.dumps({"machine": machine(), **results}, indent=1).encode())
    return path


def psnr(clip: torch.Tensor, exact: torch.Tensor) -> float:
    """In dB, of two videos of 0 to 255; infinite where they are the same."""
    error = (clip.double() - exact.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf
