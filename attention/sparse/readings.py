"""What the attention of each layer did at each step: its error, how much was computed, how long it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerReading:
    """One layer at one step, over all its passes.

    `error` is relative to dense attention, over the queries that were looked at (None: none were). `density` is the
    share of blocks that was attended exactly (None: sparse, and nobody looked), `seconds` what attention took,
    `saved_seconds` how much less than dense attention of the same run takes (None: none was timed). `model` counts
    those of a run, such as two experts.
    """

    step: int
    layer: int
    sparse: bool
    error: float | None
    density: float | None
    seconds: float
    saved_seconds: float | None = None
    model: int = 0


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

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Once the device is done."""
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else self._seconds


class Mark(Protocol):
    """A place in what a device was given to do, such as a `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Wait until the device is past it."""
        ...


def mark_on(device: torch.device) -> Mark | None:
    """Here; None on a processor, which is always past it."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


class PassReadings:
    """One pass's sums `[layers, 4]`: on the device until a layer is done, then on their way through pinned memory.

    `call` is that of the model which the pass is of, `place` its place among the passes of that.
    """

    def __init__(self, step: int, num_layers: int, device: torch.device, place: int = 0, call: int = 0) -> None:
        self.step, self.place, self.call = step, place, call
        self._sums = torch.zeros(num_layers, 4, device=device, dtype=torch.float32)
        on_gpu = device.type == "cuda"
        self._host = torch.empty(self._sums.shape, pin_memory=True) if on_gpu else None
        self._clocks: list[list[Clock]] = [[] for _ in range(num_layers)]
        self._there: list[Mark | None] = [None] * num_layers
        self.sparse = [False] * num_layers
        self.told_exact = [False] * num_layers  # by what the layer's errors were, whatever the pass
        self.unread = set(range(num_layers))

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

    def send(self, layers: range) -> None:
        """These layers are done: their sums go to the host, and nobody waits for them."""
        if self._host is not None:
            part = slice(layers.start, layers.stop)
            self._host[part].copy_(self._sums[part], non_blocking=True)
        there = mark_on(self._sums.device)
        for layer in layers:
            self._there[layer] = there

    def unlearnt(self, call: int) -> Tensor:
        """`[layers, 6]`, fp64, on the device: sums that a bound is still to learn from, 0 for layers that it is not;
        whether a layer was told to be exact; and the number of the call. `learnt_from` reads it.
        """
        unread = [layer in self.unread for layer in range(len(self.sparse))]
        rows = [
            (float(left and sparse), float(left and exact), float(call))
            for left, sparse, exact in zip(unread, self.sparse, self.told_exact, strict=True)
        ]
        told = torch.tensor(rows, dtype=torch.float64).to(self._sums.device, non_blocking=True)
        return torch.cat([torch.where(told[:, :1] > 0, self._sums.double(), 0.0), told[:, 1:]], dim=1)

    def read(self, layer: int) -> Sums:
        """Of a layer that was sent; waits until the device has done it, and for nothing after it."""
        there = self._there[layer]
        if there is not None:
            there.synchronize()
        self.unread.discard(layer)
        sums = self._sums if self._host is None else self._host
        difference, norm, density, looked = sums[layer].tolist()
        clocks = self._clocks[layer]
        return Sums(difference, norm, density, int(looked), sum(clock.seconds for clock in clocks), int(bool(clocks)))


def call_of(rows: Sequence[Sequence[float]]) -> float:
    """Which call a pass is of, by its `unlearnt` as numbers; those of earlier versions have four columns."""
    return rows[0][5] if len(rows[0]) > 4 else 0.0


def learnt_from(passes: Sequence[Sequence[float]]) -> tuple[list[Sums], bool]:
    """What `Bound.learn` takes of a layer in the passes of one call, by its rows of `unlearnt`."""
    sums = [Sums(difference, norm, density, int(looked)) for difference, norm, density, looked, *_ in passes]
    return sums, any(row[4] for row in passes if len(row) > 4)


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
