"""Host memory: how much there is, and pages of it that all go back to the system."""

import ctypes
import logging
import mmap
import os
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PAGES_FROM = 64 << 10  # bytes; what is smaller is not worth pages of its own

CGROUPS = Path("/sys/fs/cgroup")


def allocate_bytes(nbytes: int) -> Tensor:
    """Host memory for a tensor that a thread reads, `[nbytes]` uint8, its contents undefined.

    C's allocator has an arena per thread, and keeps in each what was freed there: a model's tensors, read by eight
    threads, would leave hundreds of MiB behind. Raises MemoryError naming the size.
    """
    if nbytes < PAGES_FROM:
        return torch.empty(nbytes, dtype=torch.uint8)
    return allocate_extent(nbytes)[:nbytes]


def allocate_extent(nbytes: int) -> Tensor:
    """Page-aligned host memory of whole pages, [nbytes rounded up to a page] uint8, not yet touched.

    Raises MemoryError naming the size. The memory goes back to the system with the last view of it.
    """
    size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        if sys.platform == "win32":
            area = mmap.mmap(-1, size)
        else:
            # Private, not the default shared: only private memory gets huge pages, which pin faster.
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                _advise_huge_pages(area)
    except OSError as error:
        raise MemoryError(
            f"could not allocate {size / 2**30:.2f} GiB of host memory for model weights ({error}); "
            f"free some RAM or set a RAM budget so that weights are read from disk"
        ) from error
    # I/O threads write to it, and those are never in inference mode.
    with torch.inference_mode(False):
        return torch.frombuffer(area, dtype=torch.uint8)


def touch_pages(memory: Tensor) -> None:
    """Have the system give all pages of flat `memory`, uint8 that was never written: a byte of each becomes 0."""
    memory[:: mmap.PAGESIZE].zero_()


def allocate_on_disk(path: Path, nbytes: int) -> Tensor:
    """Memory whose pages are those of a new file, [nbytes] uint8, which the system takes from RAM as it needs that.

    All of the file's place on the disk is taken now: OSError where there is not so much. The file goes with its folder.
    """
    with open(path, "w+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
        area = mmap.mmap(file.fileno(), nbytes)
    with torch.inference_mode(False):
        return torch.frombuffer(area, dtype=torch.uint8)


def _advise_huge_pages(area: mmap.mmap) -> None:
    try:
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        logger.debug("no huge pages for weights: %s", error)


def return_freed_bytes() -> None:
    """Have PyTorch's allocator of pinned memory, and C's where it is glibc's, give back to the system what was freed.

    PyTorch's keeps all of it, in sizes rounded up to powers of two. C's keeps what lies below memory in use: after a
    decoding, often a tenth of a GiB in each thread.
    """
    _empty_pinned_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _empty_pinned_cache() -> None:
    """Unpin and free what PyTorch keeps of pinned memory; nothing where it cannot be asked to."""
    if not torch.cuda.is_initialized():
        return
    accelerator = getattr(torch, "accelerator", None)
    empty = getattr(accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def total_ram_bytes() -> int:
    """The machine's RAM in bytes, or the container's limit where that is lower."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _container_bytes())])


def available_ram_bytes() -> int:
    """What could be taken of the RAM now without swapping, in bytes."""
    free = (max(0, limit - used) for limit, used in _container_bytes())
    return min([total_ram_bytes(), psutil.virtual_memory().available, *free])


def _container_bytes() -> list[tuple[int, int]]:
    """The container's limit and what it uses of it, for each version of cgroups that sets one."""
    versions = (
        (CGROUPS / "memory.max", CGROUPS / "memory.current"),
        (CGROUPS / "memory" / "memory.limit_in_bytes", CGROUPS / "memory" / "memory.usage_in_bytes"),
    )
    found = []
    for limit, usage in versions:
        numbers = [next(iter(_lines(path)), "") for path in (limit, usage)]
        if numbers[0].isdigit():  # "max": none
            used = int(numbers[1]) if numbers[1].isdigit() else 0
            found.append((int(numbers[0]), max(0, used - _cached_bytes(usage.parent / "memory.stat"))))
    return found


def _cached_bytes(stat: Path) -> int:
    """Pages of files among what a cgroup uses: they are given up for anything else. Version 1 sums them as `total_`."""
    sizes = dict(line.split()[:2] for line in _lines(stat) if len(line.split()) >= 2)
    names = ("inactive_file", "active_file")
    return sum(int(sizes.get(f"total_{name}", sizes.get(name, "0"))) for name in names)


def _lines(path: Path) -> list[str]:
    """A file's lines, none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
