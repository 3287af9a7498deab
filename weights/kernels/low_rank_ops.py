"""Which implementation of a low-rank update's two products a device runs fastest."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...system.dtypes import half_dtype
from ...system.kernel_choice import (
    Chosen,
    Trial,
    choose,
    cuda_seconds,
    disagreement,
    kept_when_final,
    loaded,
    relative_error,
)
from .low_rank_reference import TORCH, Gelu, LowRankOps

# A choice is made for updates up to each of these ranks; q, k and v with a LoRA of 64 each are one update of 192.
# Above, they are products like others, and PyTorch's.
RANKS = (64, 256)


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

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Gelu | None = None) -> None:
        choice = self._of(up.shape[1])
        (choice.up if gelu_ is None else choice.up_gelu).add_up_(y, hidden, up, gelu_)

    def _of(self, rank: int) -> Choice:
        return next((choice for choice in self.choices if rank <= choice.rank), self.choices[-1])


@kept_when_final
def select_low_rank_ops(device: torch.device) -> Chosen[LowRankOps]:
    """Per step the fastest of PyTorch's products and those Triton kernels that agree with them."""
    kernels = loaded("LoRAs beside quantised layers", _triton) if device.type == "cuda" else ()
    if not kernels:
        return Chosen(TORCH)
    steps = [[_choose(kernels, rank, step, device) for step in STEPS] for rank in RANKS]
    choices = [Choice(rank, *(chosen.best for chosen in found)) for rank, found in zip(RANKS, steps, strict=True)]
    above = Choice(sys.maxsize, TORCH, TORCH, choices[-1].up_gelu)  # a pass over y is saved at any rank
    return Chosen(ChosenLowRankOps((*choices, above)), all(chosen.is_final for found in steps for chosen in found))


def _triton() -> Sequence[LowRankOps]:
    from .low_rank import CANDIDATES

    return CANDIDATES


def _choose(kernels: Sequence[LowRankOps], rank: int, step: Step, device: torch.device) -> Chosen[LowRankOps]:
    # of few rows to check with, and of a chunk of a Wan 14B's to time: both run the same code
    probe = functools.cache(lambda num_rows: Probe(device, rank, num_rows, features=5120))
    trial: Trial[LowRankOps] = Trial(
        f"LoRA of rank {rank}, {step.__name__}",
        device,
        lambda ops: disagreement(probe(70).error(step, ops)),
        lambda ops: probe(8192).seconds(step, ops),
    )
    return choose(trial, (TORCH, *kernels), TORCH)


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
        ops.add_up_(self.x, self.hidden, self.up_factor, _gelu_)
        return self.x

    def error(self, step: Step, ops: LowRankOps) -> float:
        """Relative difference of a step to the reference; x is as before afterwards."""
        before = self.x.clone()
        results: list[Tensor] = []
        for each in (ops, TORCH):
            try:
                results.append(step(self, each).float())
            finally:
                self.x.copy_(before)
        return relative_error(*results)

    def seconds(self, step: Step, ops: LowRankOps) -> float:
        """Median time on the GPU.

        Before each run come passes over x, front to back: as in a model, where another step has just read or written
        it, and long enough for the launch to be waiting when they end.
        """
        return cuda_seconds(lambda: step(self, ops), self.device, before=lambda: [self.x.neg_() for _ in range(4)])


Step = Callable[[Probe, LowRankOps], Tensor]
STEPS: tuple[Step, ...] = (Probe.down, Probe.up, Probe.up_gelu)


def _gelu_(y: Tensor) -> None:
    torch.ops.aten.gelu_(y, approximate="tanh")
