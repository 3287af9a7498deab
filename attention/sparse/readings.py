"""What the attention of each layer did at each step: its error, how much was computed, how long it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerReading:
    """One layer at one step, over all its passes.

    `error` is relative to dense attention, over the queries that were looked at (None: none were). `density` is the
    share of blocks that was attended exactly (None: sparse, and nobody looked), `seconds` what attention took,
    `saved_seconds` how much less than dense attention of the same run takes (None: none was timed).
    """

    step: int
    layer: int
    sparse: bool
    error: float | None
    density: float | None
    seconds: float
    saved_seconds: float | None = None


@dataclass
class Sums:
    """Squares of differences and of dense answers, density and its weight, seconds; added up."""

    difference: float = 0.0
    norm: float = 0.0
    density: float = 0.0
    looked: int = 0
    seconds: float = 0.0
    passes: int = 0

    @property
    def error(self) -> float | None:
        """Relative; None where nobody looked. Infinite where a result was no number."""
        if not self.norm:
            return None
        error = math.sqrt(self.difference / self.norm)
        return error if math.isfinite(error) else math.inf

    def add(self, other: Sums) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Clock(AbstractContextManager["Clock"]):
    """The time of what a `with` block runs on a device; read later, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._began = self._seconds = 0.0

    def __enter__(self) -> Clock:
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Once the device is done."""
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else self._seconds


class PassReadings:
    """One pass's sums `[layers, 4]`, on the device until it is over, then on their way through pinned memory."""

    def __init__(self, step: int, num_layers: int, device: torch.device, place: int = 0) -> None:
        self.step, self.place = step, place  # the place of a pass among those of its step
        self._sums = torch.zeros(num_layers, 4, device=device, dtype=torch.float32)
        self._clocks: list[list[Clock]] = [[] for _ in range(num_layers)]
        self.sparse = [False] * num_layers
        self._host: Tensor | None = None
        self._there: torch.cuda.Event | None = None

    def time(self, layer: int, sparse: bool) -> Clock:
        """A clock for attention of a layer."""
        self.sparse[layer] |= sparse
        clock = Clock(self._sums.device)
        self._clocks[layer].append(clock)
        return clock

    def add(self, layer: int, compared: Tensor) -> None:
        """What `samples.compare` found."""
        self._sums[layer, :3] += compared
        self._sums[layer, 3] += (compared[1] > 0).float()  # of some heads of a card none may be looked at

    def together(self, total: Callable[[Tensor], Tensor]) -> None:
        """Several cards had some heads each: what `total` makes of one's sums is of all."""
        self._sums = total(self._sums)

    def send(self) -> None:
        """The pass is over: its sums go to the host, and nobody waits for them."""
        if self._sums.device.type != "cuda":
            self._host = self._sums
            return
        self._host = torch.empty(self._sums.shape, pin_memory=True)
        self._host.copy_(self._sums, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def read(self) -> list[Sums]:
        """Of each layer; waits until they are there."""
        assert self._host is not None, "send() comes first"
        if self._there is not None:
            self._there.synchronize()
        return [
            Sums(difference, norm, density, int(looked), sum(clock.seconds for clock in clocks), int(bool(clocks)))
            for (difference, norm, density, looked), clocks in zip(self._host.tolist(), self._clocks, strict=True)
        ]


def readings(sums: dict[tuple[int, int, bool], Sums]) -> tuple[LayerReading, ...]:
    """In the order of steps and layers; `sums` by step, layer and whether it was sparse."""
    dense = Sums()
    for (_, _, sparse), each in sums.items():
        if not sparse:
            dense.add(each)
    usual = dense.seconds / dense.passes if dense.passes else None
    return tuple(
        LayerReading(
            step, layer, sparse, each.error, _density(each, sparse), each.seconds,
            usual * each.passes - each.seconds if sparse and usual is not None else None,
        )
        for (step, layer, sparse), each in sorted(sums.items())
    )  # fmt: skip


def _density(sums: Sums, sparse: bool) -> float | None:
    if sums.looked:
        return sums.density / sums.looked
    return None if sparse else 1.0
