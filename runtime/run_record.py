"""What a run did: its phases, their memory beside what was predicted, and how blocks travelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..attention.sparse.readings import LayerReading
from ..compilation.reading import CompileReading
from ..memory.plan.footprint import Limits
from ..memory.report.intervals import Interval
from ..memory.report.report import MemoryMonitor, RunReport, card_report, outside_bytes
from ..memory.report.stream_log import StreamLog
from ..memory.stream.streams import Span
from ..sampling.caching.step_cache import CacheReading
from .streamed import Parked, StreamedModel


class RunRecord:
    """Watches one run at a time, on the clock that starts with it.

    Models that run say so (`uses`) and are started with `add_spans`.
    """

    def __init__(self, device: torch.device, others: Sequence[torch.device] = ()) -> None:
        self._device, self.others = device, tuple(others)  # cards that share its passes, from the next run on
        self._monitor = MemoryMonitor(device)
        self._card_monitors: list[tuple[torch.device, MemoryMonitor]] = []
        self._stream = StreamLog()
        self._parked: list[Parked] = []
        self._limits: Limits | None = None
        self._models: list[StreamedModel[Any]] = []
        self._pinned_bytes = 0
        self._outside_bytes = 0  # bytes of the device that were never PyTorch's here
        self._watching = ExitStack()
        self.running = False

    def begin(self, phase: str | None = None) -> None:
        """A run starts, all of it one `phase` or with phases of its own; what is known of the last one is forgotten."""
        self.end()
        self._monitor, self._stream = MemoryMonitor(self._device), StreamLog()
        self._card_monitors = [(device, MemoryMonitor(device)) for device in self.others]
        self._limits, self._models, self._pinned_bytes, self._parked = None, [], 0, []
        self._outside_bytes = outside_bytes(self._device)
        self.running = True
        self._watching.enter_context(self._monitor)
        for _, monitor in self._card_monitors:
            self._watching.enter_context(monitor)
        if phase is not None:
            self._watching.enter_context(self.phase(phase))

    def end(self) -> None:
        """The run is over; calling it again does nothing."""
        self._count_pinned()
        self.running = False
        self._watching.close()

    @contextmanager
    def run(self, limits: Limits | None = None) -> Iterator[None]:
        """A run goes in here, or, inside another run, a part of it."""
        begins = not self.running
        if begins:
            self.begin()
        self._limits = limits or self._limits
        try:
            yield
        finally:
            if begins:
                self.end()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name what runs inside, such as "denoise"; phases do not nest."""
        return self._monitor.phase(name)

    def add_spans(self, spans: Sequence[Span]) -> None:
        """Count in what timed streams did."""
        self._stream.add(spans)

    def uses(self, model: StreamedModel[Any]) -> None:
        """A model is on its device: others have made room for it."""
        if model not in self._models:
            self._models.append(model)
            if (watch := model.model.execution.watch) is not None:
                watch.forget_readings()
        self._parked = model.parked_blocks() or self._parked
        self._outside_bytes = min(self._outside_bytes, outside_bytes(self._device))
        self._count_pinned()

    def report(self) -> RunReport:
        """The run so far, or the last one."""
        plans = [model.plan for model in self._models if model.plan is not None]
        limits = plans[-1].limits if plans else self._limits
        predicted: dict[str, int] = {}
        budget, others = None, 0
        if self._device.type == "cuda" and limits is not None:
            predicted["denoise"] = max((plan.denoise.total for plan in plans), default=0)
            predicted["decode"] = max((plan.decode.total for plan in plans), default=0)
            budget, others = limits.vram_budget_bytes, max(0, self._outside_bytes - limits.context_bytes)
        return replace(
            self._monitor.report({phase: nbytes for phase, nbytes in predicted.items() if nbytes}),
            stream=self._stream.report(),
            copies=self._since_begin(self._stream.copies),
            computes=self._since_begin(self._stream.computes),
            passes=self._since_begin(self._stream.passes),
            pinned_bytes=self._pinned_bytes,
            other_bytes=others,
            budget_bytes=budget,
            attention=self._attention(),
            cards=tuple(card_report(str(device), monitor.report().samples) for device, monitor in self._card_monitors),
            step_caches=self._step_caches(),
            parked=tuple(self._stream.parked(*each) for each in self._parked),
            compiling=self._compiling(),
        )

    def _attention(self) -> tuple[LayerReading, ...]:
        """What was measured of self-attention: of the models that ran one after the other, such as two experts."""
        watches = [watch for model in self._models if (watch := model.model.execution.watch) is not None]
        return tuple(replace(each, model=model) for model, watch in enumerate(watches) for each in watch.readings())

    def _step_caches(self) -> tuple[CacheReading, ...]:
        """What was skipped of each model's steps."""
        return tuple(model.step_cache.reading() for model in self._models if model.step_cache is not None)

    def _compiling(self) -> tuple[CompileReading, ...]:
        """What compiling did of each model that runs compiled."""
        return tuple(model.compiled.reading() for model in self._models if model.compiled is not None)

    def _count_pinned(self) -> None:
        self._pinned_bytes = max(self._pinned_bytes, sum(model.pinned_bytes for model in self._models))

    def _since_begin(self, intervals: Sequence[Interval]) -> tuple[Interval, ...]:
        begun = self._monitor.origin
        return tuple((start - begun, end - begun) for start, end in intervals)
