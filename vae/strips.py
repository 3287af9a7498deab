"""Strips of rows: how a frame that does not fit is coded exactly, and where rows wait for the strip below.

A strip is coded over its whole time before the next. For every step of time there is a page, with the rows that each
layer leaves to the strip below. Pages lie on the device or, where there is no room, in RAM: then the next one arrives
and the last one leaves while one is at work.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..memory.plan.decode import PAGES_AT_WORK
from ..memory.stream.pinned import PinnedBudget, PinnedMemory, Registrar

ALIGNMENT = 128  # elements: what a slot begins with is read in words of any size

Allocate = Callable[[int], Tensor]


@dataclass(frozen=True)
class Strips:
    """A way to code frames: in strips of at most `rows` rows of pixels, exactly as whole frames.

    `in_ram`: what waits, rows between strips and frames at the latent's size, lies in RAM, pinned by `registrar` where
    one is given, instead of on the device.
    """

    rows: int
    in_ram: bool = False
    registrar: Registrar | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"in strips of {self.rows} rows" + (", with their borders in RAM" if self.in_ram else "")


class Pages:
    """A page for each step, on the device or in RAM; those at work lie on the device, always in the same places."""

    def __init__(self, num_steps: int, num_elements: int, like: Tensor, allocate: Allocate) -> None:
        """`allocate` gives the memory in which pages wait, one at a time."""
        self._num_steps, self._like, self._allocate = num_steps, like, allocate
        self._waiting: list[Tensor] = []
        self._memory = like.new_empty(PAGES_AT_WORK, num_elements)
        self._stream = torch.cuda.Stream(like.device) if like.is_cuda else None
        self._arrived: dict[int, torch.cuda.Event | None] = {}  # by step
        self._left: list[torch.cuda.Event | None] = []  # of the pages that leave, in turn
        self._page, self._used = self._memory[0], 0

    def begin(self, step: int, is_first: bool) -> None:
        """Go to a step's page; `is_first`: of the first strip, which finds zeros.

        Steps are begun in order. From the first on they may be begun again, as long as none of the strip's has ended.
        """
        if step == 0:
            self._arrived.clear()
            if is_first:
                self._memory.zero_()
        self._page, self._used = self._memory[step % PAGES_AT_WORK], 0
        if is_first:
            # Nothing arrives that would wait for what leaves the same place.
            if len(self._left) >= PAGES_AT_WORK and (event := self._left[-PAGES_AT_WORK]) is not None:
                event.wait()
            return
        for wanted in (step, step + 1):
            if wanted < self._num_steps and wanted not in self._arrived:
                self._arrived[wanted] = self._copy(self._memory[wanted % PAGES_AT_WORK], self._waiting[wanted])
        event = self._arrived.pop(step)
        if event is not None:
            event.wait()

    @property
    def page(self) -> Tensor:
        """The step's, flat."""
        return self._page

    def slot(self, num_elements: int) -> Tensor:
        """The next so many numbers of the page; the same ones where it is asked for in the same order."""
        slot = self._page[self._used : self._used + num_elements]
        self._used += aligned(num_elements)
        return slot

    def end(self, step: int) -> None:
        """The step has written what it leaves."""
        if step == len(self._waiting):
            nbytes = self._page.nbytes
            self._waiting.append(self._allocate(nbytes)[:nbytes].view(self._like.dtype))
        self._left.append(self._copy(self._waiting[step], self._page))

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy behind all work so far, and behind all other copies."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._memory.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


def aligned(num_elements: int) -> int:
    """The place that a slot takes."""
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


class Shelf:
    """Frames [B, C, h, w] of the latent's size, between layers that run in strips and those that see whole frames."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor, channels_last: bool, allocate: Allocate):
        """`shape` is a frame's; `allocate` gives RAM, or memory of the device of `like`, for one as it is first put."""
        self._shape, self._channels_last, self._allocate = shape, channels_last, allocate
        self._dtype, self._device = like.dtype, like.device
        self._frames: dict[int, Tensor] = {}

    def on(self, device: torch.device) -> Shelf:
        """The same frames, whose rows come to another device."""
        shelf = copy.copy(self)
        shelf._device = device
        return shelf

    def put(self, index: int, first_row: int, rows: Tensor) -> None:
        if index not in self._frames:
            self._frames[index] = self._new_frame()
        self._frames[index][:, :, first_row : first_row + rows.shape[2]].copy_(rows, non_blocking=True)

    def rows(self, index: int, first: int, last: int) -> Tensor:
        """Rows of a frame on the device; not to be written to."""
        return self._frames[index][:, :, first:last].to(self._device, non_blocking=True)

    def _new_frame(self) -> Tensor:
        b, c, h, w = self._shape
        nbytes = b * c * h * w * self._dtype.itemsize
        memory = self._allocate(nbytes)[:nbytes].view(self._dtype)
        return memory.view(b, h, w, c).permute(0, 3, 1, 2) if self._channels_last else memory.view(b, c, h, w)


@contextmanager
def waiting_memory(way: Strips, like: Tensor, sizes: Sequence[int] = ()) -> Iterator[Allocate]:
    """What gives the memory in which a way has its strips wait, uint8 of so many bytes or more; free afterwards.

    RAM of `sizes` that will be asked for is taken ahead, in their order, one at a time.
    """
    if not way.in_ram:
        try:
            yield lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        finally:
            if like.is_cuda:  # of a pass that ends early copies are under way to memory that others have next
                torch.cuda.synchronize(like.device)
        return
    with pinned_memory(way.registrar) as allocate, allocated_ahead(allocate, sizes) as allocate_soon:
        yield allocate_soon


@contextmanager
def allocated_ahead(allocate: Allocate, sizes: Sequence[int]) -> Iterator[Allocate]:
    """As `allocate`, of which a thread asks for the next of `sizes` meanwhile: to pin RAM takes as long as steps do.

    One at a time: while RAM is pinned the driver lets nobody else ask the device for work. What the thread met is
    raised where that size is asked for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="strip-memory") as thread:
        to_come, ahead = deque(sizes), list[tuple[int, Future[Tensor]]]()
        asked = threading.Lock()

        def go_on() -> None:
            nbytes = to_come.popleft()
            ahead.append((nbytes, thread.submit(allocate, nbytes)))

        def take(nbytes: int) -> Tensor:
            with asked:
                while nbytes in to_come and all(size != nbytes for size, _ in ahead):
                    go_on()
                index = next((place for place, (size, _) in enumerate(ahead) if size == nbytes), None)
                memory = None if index is None else ahead.pop(index)[1]
                if to_come and not ahead:
                    go_on()
            return allocate(nbytes) if memory is None else memory.result()

        if to_come:
            go_on()
        try:
            yield take
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


@contextmanager
def pinned_memory(registrar: Registrar | None, cap_bytes: int | None = None) -> Iterator[Allocate]:
    """RAM, given back at the end; pinned up to a cap where that is allowed, as copies then take a fifth."""
    memory = PinnedMemory(None if registrar is None else PinnedBudget(registrar, cap_bytes))
    try:
        yield lambda nbytes: memory.allocate(nbytes)[:nbytes]
    finally:
        if memory.pinned_bytes:
            torch.cuda.synchronize()
        memory.unpin()
