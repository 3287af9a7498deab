"""How fast model files are read: pages of the largest one, past the system's cache, by as many threads as runs have."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ..system.card_profile import DiskRow
from ..system.direct_reads import PAGE, RawFile
from ..system.host_memory import allocate_extent

READ_BYTES, QUICK_READ_BYTES = 4 << 30, 1 << 30
CHUNK = 16 << 20
NUM_THREADS = 8  # as `memory/stream/disk_blocks.py`
SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
SMALLEST = 256 << 20  # of a file that says something


def measure_disk(folder: Path, most_bytes: int) -> Iterator[DiskRow]:
    """One row: reading the largest model file of a folder, or a file itself."""
    file = largest_file(folder)
    if file is None:
        yield DiskRow(0, False, problem=f"no model file of at least {SMALLEST >> 20} MiB lies in the folder")
        return
    nbytes = min(most_bytes, file.stat().st_size) // CHUNK * CHUNK
    try:
        yield _read(file, max(nbytes, min(CHUNK, file.stat().st_size // PAGE * PAGE)))
    except OSError as error:
        yield DiskRow(0, False, problem=f"{type(error).__name__}: {error.strerror}")


def largest_file(folder: Path) -> Path | None:
    """The largest model file in a folder and those in it, or the file itself. ValueError where there is nothing."""
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected the folder with your models, such as ComfyUI/models")
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    return largest if largest is not None and largest.stat().st_size >= SMALLEST else None


def _read(path: Path, nbytes: int) -> DiskRow:
    own = threading.local()

    def read(offset: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = allocate_extent(CHUNK)
        size = min(CHUNK, nbytes - offset)
        file.read(memoryview(own.buffer.numpy())[:size], offset, size)

    with closing(RawFile(path)) as file, ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="lowvram-bench") as threads:
        began = time.perf_counter()
        jobs = [threads.submit(read, offset) for offset in range(0, nbytes, CHUNK)]
        try:
            for job in jobs:
                job.result()
        except BaseException:  # Ctrl-C, too: what waits is not begun
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        seconds = time.perf_counter() - began
        return DiskRow(nbytes, file.direct, round(nbytes / seconds / 1e9, 3))
