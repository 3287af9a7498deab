"""What every solver has in common: its shape, what it reports after a step, and the step itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .schedules import check_sigmas

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x, sigma as a 0-d CPU tensor) -> denoised, shaped as x


@dataclass(frozen=True)
class StepInfo:
    """What a step did.

    `x` is the latent after the step, at `sigma_next`; `denoised` is the estimate of the clean latent that the step
    used (for previews). Solvers never write into either afterwards, so they may be kept.
    """

    index: int
    num_steps: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor


OnStep = Callable[[StepInfo], None]


class Sampler(Protocol):
    """The shape of a solver.

    Takes x (any shape) at sigmas[0] and returns it at sigmas[-1], in float32 (or float64 if x is). `sigmas` is
    [num_steps + 1], strictly decreasing within [0, 1]; `on_step` is called after every step. `generator` feeds
    solvers that add noise; the others ignore it. Raises ValueError for malformed sigmas.
    """

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        on_step: OnStep | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


def prepare(x: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Return x in float32 (float64 stays), the checked sigmas on the CPU, and the same levels as floats."""
    # On the CPU, reading a level never waits for the device.
    sigmas = check_sigmas(sigmas).cpu()
    return x.to(torch.promote_types(x.dtype, torch.float32)), sigmas, sigmas.tolist()


def report(on_step: OnStep | None, index: int, levels: list[float], x: Tensor, denoised: Tensor) -> None:
    """Tell `on_step` about the step from levels[index], if anybody listens."""
    if on_step is not None:
        on_step(StepInfo(index, len(levels) - 1, levels[index], levels[index + 1], x, denoised))


def step_towards(target: Tensor, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Move x from sigma to sigma_next as if `target` were the clean latent."""
    return target + (sigma_next / sigma) * (x - target)
