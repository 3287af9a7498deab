"""A few pinned buffers that I/O threads fill ahead of the copies, in the order of the pass."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...system.host_memory import allocate_extent
from .pinned import PinnedBudget

Job = Callable[[], object]
Key = tuple[int, int]  # a block and its stage
Fill = Callable[[Key, Tensor], Sequence[Job]]  # what to read, buffer -> independent jobs that fill the buffer

_POLL_SECONDS = 0.1  # waits are cut into such slices so that Ctrl-C works on every system


class Fence(Protocol):
    """Something on the device that a thread can wait for."""

    def synchronize(self) -> None:
        """Block the calling thread until it has happened."""


@dataclass(eq=False)
class _Buffer:
    extent: Tensor
    pinned: bool
    block: Key | None = None  # what it holds or is being filled with; None: nothing of use
    serial: int = 0  # age: buffers are filled and emptied in this order
    taken: bool = False
    fence: Fence | None = None  # the last copy from it
    jobs: list["Future[None]"] = field(default_factory=list)
    stale: list["Future[None]"] = field(default_factory=list)  # of earlier fillings, still running


class Staging:
    """Reads ahead through `order`, over and over, into `num_buffers` buffers of `nbytes`.

    All methods belong to one thread, the one that issues the copies. Jobs run on `num_threads` threads; each
    first waits until the device has copied what its buffer held before, so nobody else has to.
    """

    def __init__(
        self,
        order: Sequence[Key],
        nbytes: int,
        fill: Fill,
        budget: PinnedBudget | None,
        num_buffers: int,
        num_threads: int,
    ) -> None:
        self._order = list(order)
        self._fill = fill
        self._budget = budget
        self._next = 0  # position in `order` of the next block to be read
        self._serial = 0
        self._buffers: list[_Buffer] = []
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="lowvram-io")
        self.refusal: str | None = None  # why the buffers are not all pinned
        try:
            for _ in range(num_buffers):
                extent = allocate_extent(nbytes)
                refusal = budget.pin(extent, is_new=True) if budget is not None else "no device to pin for"
                self._buffers.append(_Buffer(extent, refusal is None))
                self.refusal = self.refusal or refusal
        except BaseException:
            self.close()
            raise

    @property
    def host_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.extent.numel() for buffer in self._buffers)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of those that are pinned."""
        return sum(buffer.extent.numel() for buffer in self._buffers if buffer.pinned)

    def start(self) -> None:
        """Begin to read; does nothing when already begun."""
        # An interrupt may have struck between `take` and `sent`. The copies it cut off, if any were issued,
        # are still ahead of all later ones on the copy stream and their target was never declared valid, so
        # the buffer can be filled again at once.
        for buffer in self._buffers:
            if buffer.taken:
                buffer.taken, buffer.block = False, None
        for buffer in sorted(self._buffers, key=lambda one: one.serial):
            if buffer.block is None:
                self._assign(buffer)

    def available(self, block: Key) -> bool:
        """Whether `take(block)` would return at once, and without an error."""
        buffer = self._find(block)
        return buffer is not None and all(job.done() and job.exception() is None for job in buffer.jobs)

    def take(self, block: Key) -> Tensor:
        """The buffer that holds the block; waits for the threads. Raises what the reading raised."""
        self.start()
        buffer = self._find(block)
        if buffer is None:
            self._seek(block)
            buffer = self._find(block)
            assert buffer is not None
        for older in self._buffers:  # blocks that the pass has skipped
            if older.serial < buffer.serial:
                self._drop(older)
        try:
            wait_for(buffer.jobs)
        except BaseException:
            self._drop(buffer)
            raise
        buffer.taken = True
        return buffer.extent

    def sent(self, fence: Fence) -> None:
        """The copies from the buffer last taken are on their way until `fence`; read on behind them."""
        for buffer in self._buffers:
            if buffer.taken:
                buffer.fence = fence
                buffer.taken, buffer.block = False, None
        self.start()

    def close(self) -> None:
        """Stop the threads, wait for the copies, free the memory; calling it again does nothing."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while self._buffers:
            buffer = self._buffers[-1]
            if buffer.fence is not None:
                buffer.fence.synchronize()
            if buffer.pinned and self._budget is not None:
                self._budget.unpin(buffer.extent)
                buffer.pinned = False
            self._buffers.pop()

    def __del__(self) -> None:
        if hasattr(self, "_threads") and not sys.is_finalizing():
            self.close()

    def _find(self, block: Key) -> _Buffer | None:
        holders = [buffer for buffer in self._buffers if buffer.block == block and not buffer.taken]
        return min(holders, key=lambda one: one.serial, default=None)

    def _seek(self, block: Key) -> None:
        for buffer in self._buffers:
            self._drop(buffer)
        self._next = self._order.index(block)
        self.start()

    def _drop(self, buffer: _Buffer) -> None:
        # Jobs that already run cannot be called back: every later filling waits until they have ended.
        buffer.stale = [job for job in (*buffer.stale, *buffer.jobs) if not job.cancel() and not job.done()]
        buffer.jobs, buffer.block = [], None

    def _assign(self, buffer: _Buffer) -> None:
        self._drop(buffer)
        before, fence = list(buffer.stale), buffer.fence

        def run(job: Job) -> None:
            wait(before)
            if fence is not None:
                fence.synchronize()
            with torch.inference_mode():  # the buffers may be inference tensors, and modes belong to threads
                job()

        block = self._order[self._next]
        for job in self._fill(block, buffer.extent):
            buffer.jobs.append(self._threads.submit(run, job))
        self._serial += 1
        buffer.serial = self._serial
        # Last: an interrupt before this line leaves a buffer that counts as empty and is assigned anew.
        self._next = (self._next + 1) % len(self._order)
        buffer.block = block


def wait_for(jobs: Sequence["Future[None]"], check: Callable[[], None] | None = None) -> None:
    """Wait until all are done and raise what one of them raised; `check` is called meanwhile and may raise too."""
    pending = set(jobs)
    while pending:
        done, pending = wait(pending, timeout=_POLL_SECONDS)
        for job in done:
            job.result()
        if check is not None:
            check()
