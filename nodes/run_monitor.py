"""What one run of a model uses, watched from a sampler's start to its end."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch

from ..memory.lanes import TimedLanes
from ..memory.report import MemoryMonitor, RunReport, others_bytes
from ..runtime.streamed import StreamedModel


class RunMonitor:
    """Watches one run at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._monitor: MemoryMonitor | None = None
        self._watching = ExitStack()
        self._begun = 0.0
        self._beside = 0  # bytes of the device that are none of PyTorch's here
        self._streaming_since = 0.0  # perhaps in an earlier run

    def begin(self) -> None:
        """A run starts; the one before has ended."""
        self._beside = others_bytes(self._device, 0)
        self._monitor = MemoryMonitor(self._device)
        self._watching.enter_context(self._monitor)
        self._watching.enter_context(self._monitor.phase("denoise"))
        self._begun = time.perf_counter()

    def streaming_begins(self) -> None:
        """The model is on its device, others have made room: the clock of its timed lanes starts."""
        self._beside = others_bytes(self._device, 0)
        self._streaming_since = time.perf_counter()

    def end(self, streamed: StreamedModel[Any]) -> RunReport | None:
        """The report of the run that was watched; None where there was none."""
        self._watching.close()
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return None
        plan = streamed.plan
        limits = None if plan is None else plan.limits
        on_gpu = self._device.type == "cuda" and limits is not None
        report = monitor.report(
            pinned_bytes=streamed.pinned_bytes,
            other_bytes=max(0, self._beside - limits.context_bytes) if on_gpu and limits is not None else 0,
            budget_bytes=limits.vram_budget_bytes if on_gpu and limits is not None else None,
        )
        if plan is not None and on_gpu:
            report = report.with_predictions({"denoise": plan.denoise.total})
        lanes = streamed.ring.lanes if streamed.ring is not None else None
        if isinstance(lanes, TimedLanes):
            report = report.with_spans(lanes.spans(), self._streaming_since - self._begun)
        return report
