"""What a skipped pass would change, estimated in three ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

# 2048 rows of 3072 columns are 24 MiB in float32, instead of 215 MiB for a whole FramePack sequence.
ROWS_AT_ONCE = 2048


class Rule(Protocol):
    """Estimates what a pass would lose that is skipped, beside those that were since the last computed one."""

    probes: bool  # the signal is what the first block added

    def reset(self) -> None:
        """Forget all passes."""

    def estimate(self, signal: Tensor, place: float) -> float:
        """The error if this pass were skipped too; infinite where there is nothing to compare it with.

        `signal [rows, dim]`, any float dtype; `place` of the pass in the whole schedule, 0 to 1.
        """
        ...

    def settle(self, signal: Tensor, place: float, error: float | None) -> None:
        """The pass is skipped, which makes so much error, or computed (None). `signal` is copied."""


class TeaRule:
    """The relative change of a signal between consecutive passes, by a fitted polynomial that of the output, summed.

    Liu et al. 2024 (arXiv:2411.19108). `polynomial`, highest power first.
    """

    probes = False

    def __init__(self, polynomial: Sequence[float]) -> None:
        self.polynomial = tuple(polynomial)
        self.reset()

    def reset(self) -> None:
        self._signal: Tensor | None = None
        self._sum = 0.0

    def estimate(self, signal: Tensor, place: float) -> float:
        if self._signal is None or self._signal.shape != signal.shape:
            return math.inf
        return self._sum + evaluate(self.polynomial, relative_l1(signal, self._signal))

    def settle(self, signal: Tensor, place: float, error: float | None) -> None:
        self._signal = copied(signal, self._signal)
        self._sum = 0.0 if error is None else error


class MagRule:
    """How much shorter or longer the residual becomes from pass to pass, by tables measured once, summed.

    Ma et al. 2025 (arXiv:2506.09045). A table has the ratio of each step's residual to the one before, for the prompt
    and the negative one; where a batch has both, the larger error counts. Steps of another number than the table's lie
    between its own: what the ratios of a stretch of the schedule multiply to is kept.
    """

    probes = False

    def __init__(self, tables: Sequence[Sequence[float]]) -> None:
        self._logs = [tuple(accumulate(math.log(ratio) for ratio in table)) for table in tables]
        self.reset()

    def reset(self) -> None:
        self._computed: float | None = None  # place of the last computed pass
        self._sum = 0.0

    def estimate(self, signal: Tensor, place: float) -> float:
        since = self._computed
        if since is None:
            return math.inf
        return self._sum + max(abs(1 - math.exp(_at(logs, place) - _at(logs, since))) for logs in self._logs)

    def settle(self, signal: Tensor, place: float, error: float | None) -> None:
        if error is None:
            self._computed, self._sum = place, 0.0
        else:
            self._sum = error


class FirstBlockRule:
    """The relative change of what the first block adds, since the last computed pass; not summed.

    chengzeyi/ParaAttention's First Block Cache. Of `batch` samples the one that changed most counts.
    """

    probes = True

    def __init__(self, batch: int = 1) -> None:
        self._batch = batch
        self.reset()

    def reset(self) -> None:
        self._signal: Tensor | None = None

    def estimate(self, signal: Tensor, place: float) -> float:
        before = self._signal
        if before is None or before.shape != signal.shape:
            return math.inf
        pairs = zip(signal.chunk(self._batch), before.chunk(self._batch), strict=True)
        changes = [relative_l1(now, then) for now, then in pairs]
        return math.nan if any(map(math.isnan, changes)) else max(changes)

    def settle(self, signal: Tensor, place: float, error: float | None) -> None:
        if error is None:
            self._signal = copied(signal, self._signal)


def evaluate(polynomial: Sequence[float], x: float) -> float:
    """The value of a polynomial, highest power first."""
    value = 0.0
    for coefficient in polynomial:
        value = value * x + coefficient
    return value


def relative_l1(signal: Tensor, previous: Tensor) -> float:
    """Return mean |signal - previous| / mean |previous|, summed in float32; both are [rows, dim].

    Works through the rows in chunks, adds up on the device and waits for it once.
    """
    sums = torch.zeros(2, dtype=torch.float32, device=signal.device)
    for now, before in zip(signal.split(ROWS_AT_ONCE), previous.split(ROWS_AT_ONCE), strict=True):
        # A difference in bfloat16 would round away most of what is measured here.
        change = now.to(torch.float32, copy=True).sub_(before)
        sums[0] += torch.linalg.vector_norm(change, ord=1)
        sums[1] += torch.linalg.vector_norm(before, ord=1, dtype=torch.float32)
    return float((sums[0] / sums[1]).item())


def copied(tensor: Tensor, held: Tensor | None) -> Tensor:
    """A copy, in the bytes of `held` where it is alike."""
    if held is None or (held.shape, held.dtype, held.device) != (tensor.shape, tensor.dtype, tensor.device):
        return tensor.clone()
    return held.copy_(tensor)


def _at(logs: Sequence[float], place: float) -> float:
    """Linear between the table's steps, `len(logs)` of which are even over the schedule."""
    at = min(max(place * len(logs), 0.0), len(logs) - 1.0)
    first = min(int(at), len(logs) - 2) if len(logs) > 1 else 0
    if len(logs) == 1:
        return logs[0]
    return logs[first] + (at - first) * (logs[first + 1] - logs[first])
