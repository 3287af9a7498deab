"""Host memory pinned extent by extent and counted to the byte."""

import logging
import sys
import threading
from typing import Protocol

import torch
from torch import Tensor

from ...system.card_links import numbered
from ...system.host_memory import allocate_extent, total_ram_bytes, touch_pages
from ...system.sizes import in_gib

logger = logging.getLogger(__name__)


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
        self._device = numbered(device)

    def pin(self, extent: Tensor) -> bool:
        # A reader thread's current device is GPU 0, which may be another, and would get a context for this.
        with torch.cuda.device(self._device):
            code = torch.cuda.cudart().cudaHostRegister(extent.data_ptr(), extent.numel(), self._PORTABLE)
            if int(code) == 0:
                return True
            self._clear_error()
            return False

    def unpin(self, extent: Tensor) -> None:
        with torch.cuda.device(self._device):
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
            logger.debug("cleared the CUDA error of a refused host registration")


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

    def pin(self, extent: Tensor, is_new: bool = False) -> str | None:
        """Pin an extent; the reason in words when it has to stay pageable, else None.

        One that `is_new`, which nothing was written to, has all its pages first: while memory is pinned the driver lets
        nobody else ask a device for work, and four fifths of that went to pages.
        """
        with self._lock:
            if self._pinned_bytes + extent.numel() > self.cap_bytes:
                return f"the cap of {in_gib(self.cap_bytes)} on pinned memory is reached"
            self._pinned_bytes += extent.numel()
        pinned = False
        try:
            if is_new:
                touch_pages(extent)
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


class PinnedMemory:
    """Extents of RAM, each pinned where a budget (None: there is none) still allows it."""

    def __init__(self, budget: PinnedBudget | None) -> None:
        self._budget = budget
        self._pinned: list[Tensor] = []

    @property
    def pinned_bytes(self) -> int:
        return sum(extent.numel() for extent in self._pinned)

    def allocate(self, nbytes: int) -> Tensor:
        """An extent of so many bytes or more, uint8."""
        extent = allocate_extent(nbytes)
        if self._budget is not None and self._budget.pin(extent, is_new=True) is None:
            self._pinned.append(extent)
        return extent

    def unpin(self) -> None:
        """No copy is under way any more; calling it again does nothing."""
        pinned, self._pinned = self._pinned, []
        for extent in pinned:
            assert self._budget is not None
            self._budget.unpin(extent)


def default_pinned_cap() -> int:
    """Bytes that may be pinned: 40 % of RAM on Windows (more makes the driver fail), else 85 %."""
    return int(total_ram_bytes() * (0.40 if sys.platform == "win32" else 0.85))
