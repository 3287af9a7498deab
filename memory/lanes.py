"""The two lanes of a device: copies on one, compute on the other, ordered by events alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # (device bytes, host bytes), both uint8 of one length


@dataclass(frozen=True)
class BlockEvents:
    """A block's two events, made once; opaque to all but the lanes that made them."""

    block: int
    ready: Any  # recorded on the copy lane: the bytes are there
    free: Any  # recorded on the compute lane: the bytes are no longer needed


class Lanes(Protocol):
    """The device operations of a streamer. None of them makes the host wait, except `synchronize`."""

    def events(self, block: int) -> BlockEvents:
        """Make the events of a block; set-up only."""

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        """On the copy lane: wait until `after` are free, copy, record `ready`."""

    def wait_ready(self, events: BlockEvents) -> None:
        """The compute lane waits for the block's bytes."""

    def record_free(self, events: BlockEvents) -> None:
        """Record on the compute lane that all work given to it so far has used the block."""

    def after_compute(self, events: BlockEvents) -> None:
        """The copy lane waits for a `free` event."""

    def synchronize(self) -> None:
        """The host waits until both lanes are empty."""


class CudaLanes:
    """A copy stream of our own beside whatever stream is current when a block is used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy_stream = torch.cuda.Stream(device)

    def events(self, block: int) -> BlockEvents:
        # Blocking: an I/O thread that waits for a copy should sleep, not spin.
        return BlockEvents(block, torch.cuda.Event(blocking=True), torch.cuda.Event(blocking=True))

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        for other in after:
            self._copy_stream.wait_event(other.free)
        with torch.cuda.stream(self._copy_stream):
            for device_bytes, host_bytes in pairs:
                device_bytes.copy_(host_bytes, non_blocking=True)
        events.ready.record(self._copy_stream)

    def wait_ready(self, events: BlockEvents) -> None:
        self._compute_stream().wait_event(events.ready)

    def record_free(self, events: BlockEvents) -> None:
        events.free.record(self._compute_stream())

    def after_compute(self, events: BlockEvents) -> None:
        self._copy_stream.wait_event(events.free)

    def synchronize(self) -> None:
        self._copy_stream.synchronize()
        self._compute_stream().synchronize()

    def _compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


@dataclass(frozen=True)
class Span:
    """What a lane did from when to when, in milliseconds since the lanes were made."""

    lane: str  # "copy", "compute", or "stall": the compute lane waiting for a copy
    block: int
    begin_ms: float
    end_ms: float
    nbytes: int = 0


class TimedLanes(CudaLanes):
    """CudaLanes that note when each copy and each block's compute began and ended.

    Every use of a block makes new events, which are read only by `spans` after the run.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._notes: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event, int]] = []
        self._computing: tuple[int, torch.cuda.Event] | None = None
        self._origin = self._mark(self._compute_stream())

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        pairs = list(pairs)
        for other in after:
            self._copy_stream.wait_event(other.free)
        begin = self._mark(self._copy_stream)
        super().copy(pairs, (), events)
        nbytes = sum(device_bytes.numel() for device_bytes, _ in pairs)
        self._notes.append(("copy", events.block, begin, self._mark(self._copy_stream), nbytes))

    def wait_ready(self, events: BlockEvents) -> None:
        begin = self._mark(self._compute_stream())
        super().wait_ready(events)
        end = self._mark(self._compute_stream())
        self._notes.append(("stall", events.block, begin, end, 0))
        self._computing = events.block, end

    def record_free(self, events: BlockEvents) -> None:
        super().record_free(events)
        if self._computing is not None and self._computing[0] == events.block:
            block, begin = self._computing
            self._notes.append(("compute", block, begin, self._mark(self._compute_stream()), 0))
        self._computing = None

    def spans(self) -> list[Span]:
        """All that was noted since the last call; waits for the device."""
        self.synchronize()
        notes, self._notes = self._notes, []
        since = self._origin.elapsed_time
        return [Span(lane, block, since(begin), since(end), nbytes) for lane, block, begin, end, nbytes in notes]

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


class _Done:
    """The event of something that has already happened."""

    def synchronize(self) -> None:
        return


class InlineLanes:
    """Lanes of a device without streams (the CPU): a copy is done when it is asked for."""

    def events(self, block: int) -> BlockEvents:
        return BlockEvents(block, _Done(), _Done())

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        for device_bytes, host_bytes in pairs:
            device_bytes.copy_(host_bytes)

    def wait_ready(self, events: BlockEvents) -> None:
        return

    def record_free(self, events: BlockEvents) -> None:
        return

    def after_compute(self, events: BlockEvents) -> None:
        return

    def synchronize(self) -> None:
        return


def lanes_for(device: torch.device, timed: bool = False) -> Lanes:
    """The lanes of a device; `timed` ones (CUDA only) can tell afterwards what ran when."""
    if device.type == "cuda":
        return TimedLanes(device) if timed else CudaLanes(device)
    return InlineLanes()
