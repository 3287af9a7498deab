"""The two streams of a device: copies on one, compute on the other, ordered by events alone."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...system.card_links import CardStreams

Pair = tuple[Tensor, Tensor]  # (device bytes, host bytes), both uint8 of one length
NOTES_AT_A_TIME = 256


@dataclass(frozen=True)
class BlockEvents:
    """A block's two events, made once; opaque to all but the streams that made them."""

    place: int  # of the block, or of its stage, in a pass
    ready: Any  # recorded on the copy stream: the bytes are there
    free: Any  # recorded on the compute stream: the bytes are no longer needed


class _Done:
    """The event of something that has already happened."""

    def synchronize(self) -> None:
        return


class Streams:
    """The device operations of a streamer, here of a device without streams (the CPU): a copy is done when asked for.

    None of them makes the host wait, except `synchronize`.
    """

    def events(self, place: int) -> BlockEvents:
        """Make the events of the block, or stage of one, at this place in a pass; set-up only."""
        return BlockEvents(place, _Done(), _Done())

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        """On the copy stream: wait until `after` are free, copy, record `ready`."""
        for device_bytes, host_bytes in pairs:
            device_bytes.copy_(host_bytes)

    def wait_ready(self, events: BlockEvents) -> None:
        """The compute stream waits for the block's bytes."""

    def record_free(self, events: BlockEvents) -> None:
        """Record on the compute stream that all work given to it so far has used the block."""

    def after_compute(self, events: BlockEvents) -> None:
        """The copy stream waits for a `free` event."""

    def synchronize(self) -> None:
        """The host waits until both streams are empty."""


class CudaStreams(Streams):
    """A copy stream of our own beside whatever stream is current when a block is used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy_stream = torch.cuda.Stream(device)
        self._copies = CardStreams(self._copy_stream)

    def events(self, place: int) -> BlockEvents:
        # Blocking: an I/O thread that waits for a copy should sleep, not spin.
        return BlockEvents(place, torch.cuda.Event(blocking=True), torch.cuda.Event(blocking=True))

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        for other in after:
            self._copy_stream.wait_event(other.free)
        with torch.cuda.stream(self._copy_stream):
            for device_bytes, host_bytes in pairs:
                if host_bytes.device.type == "cuda":  # parked on another card
                    self._copies.copy(device_bytes, host_bytes)
                else:
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
    """What a stream did from when to when, in seconds of `time.perf_counter`, whichever streams did it."""

    kind: str  # "copy", "compute", or "stall": the compute stream waiting for a copy
    place: int  # in a pass, of a block or a stage of one: it grows from the first to the last
    begin: float
    end: float
    nbytes: int = 0


SpanSink = Callable[[Sequence[Span]], None]


class _Note(NamedTuple):
    """A span to be, once the device has passed its events."""

    kind: str
    place: int
    begin: torch.cuda.Event
    end: torch.cuda.Event
    nbytes: int = 0


class TimedStreams(CudaStreams):
    """CudaStreams that tell `on_spans` when each copy and each block's compute began and ended.

    Every use of a block makes new events. Those that the device has passed are read some hundred at a time, the last
    ones by `synchronize`: the host waits for none of them elsewhere.
    """

    def __init__(self, device: torch.device, on_spans: SpanSink) -> None:
        super().__init__(device)
        self._on_spans = on_spans
        self._notes: deque[_Note] = deque()
        self._computing: tuple[int, torch.cuda.Event] | None = None
        # an event of the device, and when that was on the host's clock
        self._known = self._mark(self._compute_stream())
        self._known.synchronize()
        self._known_seconds = time.perf_counter()

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        pairs = list(pairs)
        for other in after:
            self._copy_stream.wait_event(other.free)
        begin = self._mark(self._copy_stream)
        super().copy(pairs, (), events)
        nbytes = sum(device_bytes.numel() for device_bytes, _ in pairs)
        self._note(_Note("copy", events.place, begin, self._mark(self._copy_stream), nbytes))

    def wait_ready(self, events: BlockEvents) -> None:
        begin = self._mark(self._compute_stream())
        super().wait_ready(events)
        end = self._mark(self._compute_stream())
        self._note(_Note("stall", events.place, begin, end))
        self._computing = events.place, end

    def record_free(self, events: BlockEvents) -> None:
        super().record_free(events)
        if self._computing is not None and self._computing[0] == events.place:
            block, begin = self._computing
            self._note(_Note("compute", block, begin, self._mark(self._compute_stream())))
        self._computing = None

    def synchronize(self) -> None:
        super().synchronize()
        self._tell()

    def _note(self, note: _Note) -> None:
        self._notes.append(note)
        if len(self._notes) >= NOTES_AT_A_TIME:
            self._tell()

    def _tell(self) -> None:
        """Hand over what the device has done."""
        passed: list[_Note] = []
        while self._notes and self._notes[0].end.query():
            passed.append(self._notes.popleft())
        if not passed:
            return
        known, seconds = self._known, self._known_seconds

        def when(event: torch.cuda.Event) -> float:
            return seconds + known.elapsed_time(event) / 1e3

        self._on_spans([Span(note.kind, note.place, when(note.begin), when(note.end), note.nbytes) for note in passed])
        # a near one: times since an event are of single precision
        self._known, self._known_seconds = passed[-1].end, when(passed[-1].end)

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


def streams_for(device: torch.device, on_spans: SpanSink | None = None) -> Streams:
    """The streams of a device; on CUDA `on_spans` is told what ran when."""
    if device.type != "cuda":
        return Streams()
    return CudaStreams(device) if on_spans is None else TimedStreams(device, on_spans)
