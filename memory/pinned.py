"""Page-aligned host memory, pinned extent by extent and counted to the byte."""

import ctypes
import logging
import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .layout import align

log = logging.getLogger(__name__)

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Registrar(Protocol):
    """Pins host memory for a device. `pin` is called from reader threads, one extent at a time each."""

    def pin(self, extent: Tensor) -> bool:
        """Pin a page-aligned uint8 tensor; False when the system refuses."""

    def unpin(self, extent: Tensor) -> None:
        """Undo `pin`; no copy from the extent may still be under way when the memory goes."""


class CudaRegistrar:
    """Pins with cudaHostRegister: exact sizes, unlike torch's pin_memory (which rounds up to powers of two)."""

    _PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pin(self, extent: Tensor) -> bool:
        code = torch.cuda.cudart().cudaHostRegister(extent.data_ptr(), extent.numel(), self._PORTABLE)
        if int(code) == 0:
            return True
        self._clear_error()
        return False

    def unpin(self, extent: Tensor) -> None:
        # The driver does not wait for copies that still read these pages.
        torch.cuda.synchronize(self._device)
        if int(torch.cuda.cudart().cudaHostUnregister(extent.data_ptr())) != 0:
            self._clear_error()

    def _clear_error(self) -> None:
        # A refused registration stays behind as the thread's "last error", and the next innocent kernel
        # launch would report it. Launch one here to collect it.
        try:
            torch.zeros(1, device=self._device).add_(1)
        except RuntimeError:
            log.debug("cleared the CUDA error of a refused host registration")


class PinnedBudget:
    """Counts pinned bytes against a cap, for everything that one run pins."""

    def __init__(self, registrar: Registrar, cap_bytes: int | None = None) -> None:
        self.cap_bytes = default_pinned_cap() if cap_bytes is None else cap_bytes
        self._registrar = registrar
        self._pinned_bytes = 0
        self._lock = threading.Lock()

    @property
    def pinned_bytes(self) -> int:
        """Bytes pinned now."""
        return self._pinned_bytes

    def pin(self, extent: Tensor) -> str | None:
        """Pin an extent; the reason in words when it has to stay pageable, else None."""
        with self._lock:
            if self._pinned_bytes + extent.numel() > self.cap_bytes:
                return f"the cap of {self.cap_bytes / 2**30:.2f} GiB on pinned memory is reached"
            self._pinned_bytes += extent.numel()
        pinned = False
        try:
            pinned = self._registrar.pin(extent)
        finally:
            if not pinned:
                self._give_back(extent)
        return None if pinned else "the system refused to pin more memory"

    def unpin(self, extent: Tensor) -> None:
        """Undo a successful `pin`."""
        self._registrar.unpin(extent)
        self._give_back(extent)

    def _give_back(self, extent: Tensor) -> None:
        with self._lock:
            self._pinned_bytes -= extent.numel()


def allocate_extent(nbytes: int) -> Tensor:
    """Page-aligned host memory of whole pages, [nbytes rounded up to a page] uint8, not yet touched.

    Raises MemoryError naming the size. The memory goes back to the system with the last view of it.
    """
    size = align(max(nbytes, 1), mmap.PAGESIZE)
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


def _advise_huge_pages(area: mmap.mmap) -> None:
    try:
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        log.debug("no huge pages for weights: %s", error)


def default_pinned_cap() -> int:
    """Bytes that may be pinned: 40 % of RAM on Windows (more makes the driver fail), else 85 %."""
    return int(total_ram_bytes() * (0.40 if sys.platform == "win32" else 0.85))


def total_ram_bytes() -> int:
    """The machine's RAM in bytes, or the container's limit where that is lower."""
    if sys.platform == "win32":
        return _windows_ram_bytes()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return ram
    return min(ram, int(limit)) if limit.isdigit() else ram


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    ]


def _windows_ram_bytes() -> int:
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - absent elsewhere, also for type checkers
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed: the amount of RAM is unknown")
    return int(status.ullTotalPhys)
