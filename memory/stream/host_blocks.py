"""A model's blocks in host memory: one exact, pinned, flat extent per block, in the file's bytes."""

import logging
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from ...system.host_memory import allocate_extent
from ...system.sizes import in_gib
from .host_extents import STAGING_BUFFERS, HostExtents
from .layout import BlockLayout, LayoutError, Part, TensorPlace, TensorSource
from .pinned import PinnedBudget
from .staging import wait_for

logger = logging.getLogger(__name__)


class HostBlocks(HostExtents):
    """All blocks in RAM, read once, straight to where the device copies them from.

    `pin` names the blocks to pin while reading (default: all; those that will be streamed are enough).
    `check` is called ten times a second meanwhile and may raise to give up. Extents that cannot be pinned
    stay pageable and travel through a small pinned staging pair. Without a `budget` nothing is pinned; another one
    may be given between runs while nothing is pinned.
    """

    def __init__(
        self,
        source: TensorSource,
        layouts: Sequence[BlockLayout],
        budget: PinnedBudget | None = None,
        pin: Collection[int] | None = None,
        num_threads: int = 8,
        check: Callable[[], None] | None = None,
    ) -> None:
        extents: list[Tensor] = []
        super().__init__(layouts, extents)
        self._areas: list[Tensor] = []  # the same, rounded up to whole pages: what gets pinned
        self.budget = budget
        self._pinned: set[int] = set()
        self._refused: set[int] = set()
        self._complaints: set[str] = set()
        self._num_threads = num_threads
        self._lock = threading.Lock()
        try:
            for layout in self.layouts:
                area = allocate_extent(layout.nbytes)
                self._areas.append(area)
                extents.append(area[: layout.nbytes])
            wanted = range(len(self.layouts)) if pin is None else pin
            self._read(source, self._within_cap(wanted), check)
        except BaseException:
            self.release()
            raise

    @property
    def pinned_bytes(self) -> int:
        """Bytes pinned for these blocks, the staging pair included."""
        return sum(self._areas[index].numel() for index in self._pinned) + super().pinned_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held, pinned or not."""
        return sum(area.numel() for area in self._areas) + super().host_bytes

    def is_pinned(self, index: int) -> bool:
        """Whether the device copies from this block's extent by itself."""
        return index in self._pinned

    def refill(self, source: TensorSource, check: Callable[[], None] | None = None, pin: Collection[int] = ()) -> None:
        """Read another model of the same layout (Wan 2.2's other expert) over this one's extents, pinned as they are.

        Of the blocks to `pin` those that are not yet are pinned while they are read. The streamer must be unloaded or
        have lost its ring first. Raises LayoutError on another layout.
        """
        for layout in self.layouts:
            for place in layout.places:
                info = source.tensors.get(f"{layout.prefix}.{place.name}")
                if info is None or (info.dtype, tuple(info.shape)) != (place.dtype, place.shape):
                    raise LayoutError(
                        f"{layout.prefix}.{place.name}: expected {place.dtype} {place.shape} as in the model "
                        f"now in memory, got {None if info is None else (info.dtype, tuple(info.shape))}; "
                        f"load this model on its own"
                    )
        self.pause()
        self._read(source, self._within_cap(set(pin) - self._pinned - self._refused), check)

    # What a streamer asks of its source; DiskBlocks answers the same.

    def prepare(self, order: Sequence[int], part: Part, in_stages: bool = False) -> None:
        """Blocks `order` will be copied to the device over and over, this part of each, whole or stage by stage."""
        self.pause()  # what staging had pinned may be blocks'
        for index in sorted(self._within_cap(set(order) - self._pinned - self._refused)):
            self._pin(index)
        self._stage([index for index in order if index not in self._pinned], part, in_stages, self.budget)

    def retry_pinning(self) -> None:
        """The next `prepare` asks for what was refused too: others may have given pinned memory back."""
        self._refused.clear()

    def unpin(self) -> None:
        """Give the pinned memory back and keep the bytes; `prepare` pins again. Unload the streamer first."""
        self.pause()
        self.retry_pinning()
        while self._pinned and self.budget is not None:
            index = next(iter(self._pinned))
            self.budget.unpin(self._areas[index])
            self._pinned.discard(index)

    def release(self) -> None:
        """Unpin and free everything; calling it again does nothing. Unload the streamer first."""
        self.unpin()
        self.extents.clear()
        self._areas.clear()

    def __del__(self) -> None:
        if hasattr(self, "_lock") and not sys.is_finalizing():
            self.release()

    def _within_cap(self, wanted: Collection[int]) -> frozenset[int]:
        """Of the blocks wanted pinned, the first that fit, with room kept for staging if not all do."""
        if self.budget is None:
            return frozenset()
        room = self.budget.cap_bytes - self.budget.pinned_bytes
        sizes = {index: self._areas[index].numel() for index in sorted(wanted)}
        if sum(sizes.values()) > room or self._refused:
            room -= STAGING_BUFFERS * max(area.numel() for area in self._areas)
        chosen = set()
        for index, nbytes in sizes.items():
            if nbytes <= room:
                room -= nbytes
                chosen.add(index)
            else:
                self._complain(index, f"the cap of {in_gib(self.budget.cap_bytes)} is reached")
        return frozenset(chosen)

    def _read(self, source: TensorSource, pin: frozenset[int], check: Callable[[], None] | None) -> None:
        stop = threading.Event()
        left = [len(layout.places) for layout in self.layouts]

        def read(index: int, place: TensorPlace) -> None:
            if stop.is_set():
                return
            out = self.extents[index][place.offset : place.offset + place.nbytes]
            source.read_into(f"{self.layouts[index].prefix}.{place.name}", out)
            with self._lock:
                left[index] -= 1
                complete = left[index] == 0
            # Pinning pages that are already there is quick, and other threads read on meanwhile.
            if complete and index in pin and not stop.is_set():
                self._pin(index)

        threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="lowvram-read")
        try:
            jobs = [
                threads.submit(read, index, place)
                for index, layout in enumerate(self.layouts)
                for place in layout.places
            ]
            wait_for(jobs, check)
        finally:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)

    def _pin(self, index: int) -> None:
        assert self.budget is not None
        reason = self.budget.pin(self._areas[index])
        if reason is None:
            self._pinned.add(index)
        else:
            self._complain(index, reason)

    def _complain(self, index: int, reason: str) -> None:
        self._refused.add(index)
        with self._lock:
            known = reason in self._complaints
            self._complaints.add(reason)
        if not known:
            logger.warning(
                "%s and perhaps more blocks stay in pageable memory, which is slower to copy from: %s",
                self.layouts[index].prefix,
                reason,
            )
