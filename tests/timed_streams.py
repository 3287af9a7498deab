"""Streams of the CPU that tell what ran when, as those of a GPU do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from lowvram_video.memory.stream.streams import BlockEvents, Pair, Span, SpanSink, Streams


class TimedInlineStreams(Streams):
    """Tells `on_spans` when it is waited for."""

    def __init__(self, on_spans: SpanSink) -> None:
        self.on_spans = on_spans
        self.spans: list[Span] = []
        self._computing: tuple[int, float] | None = None

    def copy(self, pairs: Iterable[Pair], after: Sequence[BlockEvents], events: BlockEvents) -> None:
        begin, pairs = time.perf_counter(), list(pairs)
        super().copy(pairs, after, events)
        nbytes = sum(device_bytes.numel() for device_bytes, _ in pairs)
        self.spans.append(Span("copy", events.place, begin, time.perf_counter(), nbytes))

    def wait_ready(self, events: BlockEvents) -> None:
        now = time.perf_counter()
        self.spans.append(Span("stall", events.place, now, now))
        self._computing = events.place, now

    def record_free(self, events: BlockEvents) -> None:
        if self._computing is not None and self._computing[0] == events.place:  # else a ring's own event
            self.spans.append(Span("compute", *self._computing, time.perf_counter()))
        self._computing = None

    def synchronize(self) -> None:
        spans, self.spans = self.spans, []
        self.on_spans(spans)
