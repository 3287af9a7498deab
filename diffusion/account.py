"""What a run may use of the machine, and what it has used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..host_memory import available_ram_bytes
from ..memory.footprint import GIB, Limits
from ..memory.lanes import Span
from ..memory.limits import hold_budget, limits_for
from ..memory.report import MemoryMonitor, RunReport, others_bytes
from ..runtime.streamed import StreamedModel
from .settings import RunSettings
from .workspace import Execution


class RunAccount:
    """A pipeline's limits, known before a run; then memory, pinned bytes and spans of that run, for its report."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._monitor = MemoryMonitor(settings.device)
        self._limits: Limits | None = None
        self._others_bytes = 0
        self._pinned_bytes = 0
        self._spans: list[Span] = []
        self._models: list[StreamedModel[Any]] = []  # those that have run

    @property
    def limits(self) -> Limits | None:
        """What the run may use; None before `begin`."""
        return self._limits

    def begin(self, execution: Execution) -> Limits:
        """A run's limits by its settings and what is free now, of VRAM and of RAM.

        From here on PyTorch's allocator holds the VRAM budget.
        """
        settings = self._settings
        ram_budget_gib = settings.ram_budget_gib
        if ram_budget_gib is None:  # what a model already holds there is not wanted again
            ram_budget_gib = (available_ram_bytes() + sum(model.host_bytes for model in self._models)) / GIB
        limits = limits_for(
            settings.device,
            vram_budget_gib=settings.vram_budget_gib,
            ram_budget_gib=ram_budget_gib,
            blocks_to_swap=settings.blocks_to_swap,
            num_slots=None if settings.prefetch is None else settings.prefetch + 1,
            fused=execution.ops.name != "eager",
            sage_attention=execution.attention.name == "sageattn",
        )
        self._limits = limits if settings.pinned_memory else replace(limits, pinned_cap_bytes=0)
        hold_budget(settings.device, self._limits)
        self._others_bytes = others_bytes(settings.device, self._limits.context_bytes)
        self._monitor = MemoryMonitor(settings.device)
        self._pinned_bytes = 0
        self._spans.clear()
        return self._limits

    @property
    def monitor(self) -> MemoryMonitor:
        """The run's own; enter it while the run lasts."""
        return self._monitor

    def note_pinned(self, model: StreamedModel[Any]) -> None:
        """Count what a model that has just started has pinned."""
        if model not in self._models:
            self._models.append(model)
        self._pinned_bytes = max(self._pinned_bytes, model.pinned_bytes)

    def note_spans(self, model: StreamedModel[Any]) -> None:
        """Keep what a model's lanes did, on the monitor's clock: the lanes go when the model stops."""
        spans, age = model.spans()
        since_ms = 1e3 * (self._monitor.now() - age)
        self._spans += [replace(s, begin_ms=s.begin_ms + since_ms, end_ms=s.end_ms + since_ms) for s in spans]

    def report(self, predicted_bytes: Mapping[str, int]) -> RunReport:
        """What the last run used, beside what was predicted for its phases."""
        budget = self._limits.vram_budget_bytes if self._limits and self._settings.device.type == "cuda" else None
        report = self._monitor.report(self._pinned_bytes, self._others_bytes, budget)
        if self._spans:
            report = report.with_spans(self._spans, 0.0)
        return report if budget is None else report.with_predictions(dict(predicted_bytes))
