"""From a velocity model to a denoiser: classifier-free guidance, its rescaled form, and the two experts of Wan 2.2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .schedules import NUM_TRAIN_TIMESTEPS, is_high_noise
from .solver import Denoiser

# (latent [B, ...], timestep [B] = sigma * 1000 in float32, context [B, L, C]) -> velocity [B, ...].
# The latent arrives in the solver's float32; the function casts it to whatever its model computes in.
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
# The same with everything but (latent, sigma as a 0-d CPU tensor) bound, one for each prompt.
BoundVelocity = Callable[[Tensor, Tensor], Tensor]
Expert = Literal["high", "low"]


@dataclass(frozen=True)
class Guidance:
    """A Denoiser made of a velocity model, its text context and classifier-free guidance.

    `cond` and `uncond` are [B, L, C], or [1, L, C] for every sample of a batch. Where `scale` is 1 the unconditional
    pass does not run. `batched` runs both passes as one batch of 2 B, cond first: fewer, larger launches for twice the
    activation memory.
    Raises ValueError for a scale other than 1 without `uncond`, or contexts that cannot share a batch.
    """

    velocity: Velocity
    cond: Tensor
    uncond: Tensor | None = None
    scale: float = 1.0
    batched: bool = False

    def __post_init__(self) -> None:
        _check_scale(self.scale, self.uncond)
        if self.batched and self.uncond is not None and self.cond.shape[1:] != self.uncond.shape[1:]:
            raise ValueError(
                f"cond {list(self.cond.shape)} and uncond {list(self.uncond.shape)} cannot share a batch: pad them "
                "to one length, or set batched to False."
            )

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided clean latent for x at `sigma` (0-d), in the shape of x."""
        if self.scale == 1.0 or self.uncond is None:
            return self._denoised(x, sigma, self.cond)
        if self.batched:
            context = torch.cat([_for_batch(self.cond, x), _for_batch(self.uncond, x)])
            denoised_cond, denoised_uncond = self._denoised(torch.cat([x, x]), sigma, context).chunk(2)
        else:
            denoised_cond = self._denoised(x, sigma, self.cond)
            denoised_uncond = self._denoised(x, sigma, self.uncond)
        return classifier_free(denoised_cond, denoised_uncond, self.scale)

    def _denoised(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        level = float(sigma)
        timestep = torch.full((len(x),), level * NUM_TRAIN_TIMESTEPS, dtype=torch.float32, device=x.device)
        return velocity_to_denoised(x, self.velocity(x, timestep, _for_batch(context, x)), level)


@dataclass(frozen=True)
class RescaledGuidance:
    """A Denoiser made of two bound velocity functions, guided and rescaled as FramePack does.

    Each function is one pass over its own prompt (and its own step cache). Where `scale` is 1, `uncond` never runs.
    `rescale` is phi of `rescale_to_cond`. Raises ValueError for a scale other than 1 without `uncond`, or values out
    of range.
    """

    cond: BoundVelocity
    uncond: BoundVelocity | None = None
    scale: float = 1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        _check_scale(self.scale, self.uncond)
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"Guidance rescale is {self.rescale}; expected 0 (off) to 1 (the deviation of cond).")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the guided clean latent for x at `sigma` (0-d), in the shape of x."""
        velocity = self.cond(x, sigma).to(x.dtype)
        if self.scale != 1.0 and self.uncond is not None:
            guided = classifier_free(velocity, self.uncond(x, sigma).to(x.dtype), self.scale)
            velocity = rescale_to_cond(guided, velocity, self.rescale)
        return velocity_to_denoised(x, velocity, float(sigma))


@dataclass
class ExpertSwitch:
    """A Denoiser that gives each noise level to its expert: `high` where sigma >= boundary, else `low` (Wan 2.2).

    Each expert is a Denoiser with its own guidance scale. `loaded` is the expert whose weights are in place now;
    `on_switch` is called with the name of the other one just before its first evaluation, once for each change, so
    a run down the noise levels calls it exactly once. If `on_switch` raises, `loaded` stays as it was.
    Raises ValueError unless `boundary` lies between 0 and 1.
    """

    high: Denoiser
    low: Denoiser
    boundary: float
    on_switch: Callable[[Expert], None] | None = None
    loaded: Expert = "high"

    def __post_init__(self) -> None:
        is_high_noise(torch.tensor(1.0), self.boundary)  # a wrong boundary fails here, not minutes later
        if self.loaded not in ("high", "low"):
            raise ValueError(f"loaded is {self.loaded!r}; expected 'high' or 'low'.")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean latent that the expert for `sigma` (0-d) predicts, in the shape of x."""
        needed: Expert = "high" if is_high_noise(sigma, self.boundary) else "low"
        if needed != self.loaded:
            if self.on_switch is not None:
                self.on_switch(needed)
            self.loaded = needed
        return self.high(x, sigma) if needed == "high" else self.low(x, sigma)


def batch_and_passes(guided: bool, batched: bool) -> tuple[int, int]:
    """Return the batch of a pass and the passes of a step: `guided`, cond and uncond, `batched` or one by one."""
    if not guided:
        return 1, 1
    return (2, 1) if batched else (1, 2)


def classifier_free(denoised_cond: Tensor, denoised_uncond: Tensor, scale: float) -> Tensor:
    """Return uncond + scale * (cond - uncond): Ho & Salimans 2022 (arXiv:2207.12598), scale = w + 1 there.

    Denoised is affine in velocity, so this equals guiding the velocity as Wan's own pipeline does.
    """
    return denoised_uncond + scale * (denoised_cond - denoised_uncond)


def rescale_to_cond(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Return `guided` with part of its deviation, over each sample of a batch, brought back to that of `cond`.

    rescale * guided * std(cond) / std(guided) + (1 - rescale) * guided: Lin et al. 2023 (arXiv:2305.08891), section
    3.4, as in diffusers' `rescale_noise_cfg`. Not affine: it belongs on the velocity, where FramePack has it.
    """
    if rescale == 0.0:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (rescale * ratio + (1.0 - rescale))


def velocity_to_denoised(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Return x - sigma * velocity in x's dtype, for velocity = noise - clean (arXiv:2403.03206)."""
    return x - sigma * velocity.to(x.dtype)


def _check_scale(scale: float, uncond: object) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"Guidance scale is {scale}; expected a finite number (1 turns guidance off).")
    if scale != 1.0 and uncond is None:
        raise ValueError(
            f"Guidance scale is {scale} but there is no uncond context; pass the negative prompt's, or use scale 1."
        )


def _for_batch(context: Tensor, x: Tensor) -> Tensor:
    """Give a context of one sample to every sample of x; one of the right size stays the same object."""
    if len(context) == len(x):
        return context
    if len(context) == 1:
        return context.expand(len(x), *context.shape[1:])
    raise ValueError(f"Context has {len(context)} samples and the latent {len(x)}; expected 1 or as many.")
