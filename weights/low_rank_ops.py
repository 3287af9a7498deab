"""The two products of a low-rank update, and which implementation of them a device runs fastest.

Both are bound by memory: one reads x `[rows, in]`, the other reads and writes y `[rows, out]`; what they make and read
besides, `hidden [rows, R]` and the factors, stays in cache. Up to R = 200 or so an H200 multiplies faster than that.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..half_precision import half_dtype
from ..triton_errors import triton_errors

logger = logging.getLogger(__name__)

# A choice is made for updates up to each of these ranks; q, k and v with a LoRA of 64 each are one update of 192.
# Above, they are products like others, and PyTorch's.
RANKS = (64, 256)


class LowRankOps(Protocol):
    """Sums in fp32; results in the dtype of `x` or `y`."""

    @property
    def name(self) -> str: ...

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        """`x [rows, in] @ down [R, in].T * scale [R]`: `[rows, R]`; `scale` is fp32."""
        ...

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor) -> None:
        """`y [rows, out] += hidden [rows, R] @ up [out, R].T`."""
        ...

    def add_up_gelu_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Callable[[Tensor], None]) -> None:
        """The same, then GELU (tanh approximation), in one pass over y where it can be; `gelu_` is the other pass."""
        ...


class TorchLowRankOps:
    """The reference, and what runs without Triton."""

    name = "torch"

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        return (x @ down.t()).mul_(scale)

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor) -> None:
        y.addmm_(hidden, up.t())

    def add_up_gelu_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Callable[[Tensor], None]) -> None:
        self.add_up_(y, hidden, up)
        gelu_(y)


TORCH = TorchLowRankOps()


@dataclass(frozen=True)
class Choice:
    """What runs each step of updates up to `rank`."""

    rank: int
    down: LowRankOps
    up: LowRankOps
    up_gelu: LowRankOps


@dataclass(frozen=True)
class ChosenLowRankOps:
    """The fastest for each step and rank; `choices` by ascending rank, the last one for any."""

    choices: tuple[Choice, ...]
    name: str = "chosen"

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        return self._of(down.shape[0]).down.project_down(x, down, scale)

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor) -> None:
        self._of(up.shape[1]).up.add_up_(y, hidden, up)

    def add_up_gelu_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Callable[[Tensor], None]) -> None:
        self._of(up.shape[1]).up_gelu.add_up_gelu_(y, hidden, up, gelu_)

    def _of(self, rank: int) -> Choice:
        for choice in self.choices[:-1]:
            if rank <= choice.rank:
                return choice
        return self.choices[-1]


@functools.cache
def select_low_rank_ops(device: torch.device) -> LowRankOps:
    """Per step the fastest of PyTorch's products and those Triton kernels that agree with them; tried once."""
    if device.type != "cuda":
        return TORCH
    if importlib.util.find_spec("triton") is None:
        logger.info("Triton is not installed: LoRAs beside quantised layers run by PyTorch (slower).")
        return TORCH
    try:
        from .kernels.low_rank import CANDIDATES

        choices = [_choose(CANDIDATES, rank, device) for rank in RANKS]
    except triton_errors() as problem:
        logger.warning("Triton cannot be used (%s): LoRAs beside quantised layers run by PyTorch.", problem)
        return TORCH
    torch.cuda.empty_cache()  # the probes' buffers: a plan counts on that memory
    above = Choice(sys.maxsize, TORCH, TORCH, choices[-1].up_gelu)  # a pass over y is saved at any rank
    return ChosenLowRankOps((*choices, above))


def _choose(candidates: Sequence[LowRankOps], rank: int, device: torch.device) -> Choice:
    small, large = probes(device, rank)
    picks: list[LowRankOps] = []
    for step in (Probe.down, Probe.up, Probe.up_gelu):
        working = [ops for ops in candidates if agrees(step, ops, small)]
        times = {ops: large.seconds(step, ops) for ops in (TORCH, *working)}
        shown = ", ".join(f"{ops.name} {1e3 * took:.3f} ms" for ops, took in times.items())
        logger.info("LoRA, rank %d, %s: %s", rank, step.__name__, shown)
        picks.append(min(times, key=lambda ops: times[ops]))
    return Choice(rank, *picks)


class Probe:
    """One update of random numbers, to check and time steps with; needs about 4 x rows x features bytes."""

    def __init__(self, device: torch.device, rank: int, num_rows: int, features: int):
        generator = torch.Generator(device).manual_seed(0)
        dtype = half_dtype(device)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        self.device = device
        self.x, self.hidden = draw(num_rows, features), draw(num_rows, rank)
        self.down_factor, self.up_factor = draw(rank, features) / features**0.5, draw(features, rank) / rank**0.5
        self.scale = torch.rand(rank, generator=generator, device=device) + 0.5

    def down(self, ops: LowRankOps) -> Tensor:
        return ops.project_down(self.x, self.down_factor, self.scale)

    def up(self, ops: LowRankOps) -> Tensor:
        ops.add_up_(self.x, self.hidden, self.up_factor)
        return self.x

    def up_gelu(self, ops: LowRankOps) -> Tensor:
        ops.add_up_gelu_(self.x, self.hidden, self.up_factor, _gelu_)
        return self.x

    def error(self, step: Callable[[Probe, LowRankOps], Tensor], ops: LowRankOps) -> float:
        """Relative difference of a step to the reference; x is as before afterwards."""
        before = self.x.clone()
        got = step(self, ops).float()
        self.x.copy_(before)
        want = step(self, TORCH).float()
        self.x.copy_(before)
        return float((got - want).norm() / want.norm())

    def seconds(self, step: Callable[[Probe, LowRankOps], Tensor], ops: LowRankOps, repeats: int = 7) -> float:
        """Median time on the GPU.

        Before each run come passes over x, front to back: as in a model, where another step has just read or written
        it, and long enough for the launch to be waiting when they end.
        """
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 2)]
        for start, end in events:
            for _ in range(4):
                self.x.neg_()
            start.record()
            step(self, ops)
            end.record()
        torch.cuda.synchronize(self.device)
        return sorted(start.elapsed_time(end) for start, end in events[2:])[repeats // 2] / 1e3


def probes(device: torch.device, rank: int) -> tuple[Probe, Probe]:
    """One to check with and one to time with: of few rows and of a chunk of a Wan 14B's; both run the same code."""
    return Probe(device, rank, num_rows=70, features=5120), Probe(device, rank, num_rows=8192, features=5120)


def agrees(step: Callable[[Probe, LowRankOps], Tensor], ops: LowRankOps, probe: Probe) -> bool:
    """Whether a step works here as it should; logged where not."""
    try:
        error = probe.error(step, ops)
    except triton_errors() as problem:
        logger.info("%s is not used for LoRAs: %s", ops.name, problem)
        return False
    if not error < 2e-2:
        logger.warning("%s disagrees with PyTorch on this GPU (%.1e): not used for LoRAs.", ops.name, error)
        return False
    return True


def _gelu_(y: Tensor) -> None:
    torch.ops.aten.gelu_(y, approximate="tanh")
