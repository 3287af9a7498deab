"""Noise levels of the flow-matching path, from pure noise (sigma 1) to the clean latent (sigma 0).

x_sigma = (1 - sigma) * clean + sigma * noise, and the model is told sigma * 1000.
Sources: Esser et al. 2024 (arXiv:2403.03206) for the path and the shift; Wan-Video/Wan2.2
`wan/utils/fm_solvers.py` and ComfyUI `comfy/samplers.py` for the spacings;
lllyasviel/FramePack for its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
SPACINGS = ("uniform", "simple")
FRAMEPACK_MAX_SHIFT = 7.0


def flow_sigmas(num_steps: int, shift: float, spacing: str = "uniform") -> Tensor:
    """Return the noise levels of one run, float32 [num_steps + 1] on the CPU, strictly decreasing to 0.

    `shift` bends the levels towards noise (see `shift_sigma`).

    `spacing` says where the unshifted levels lie:
        "uniform"  1, 1 - 1/n, ..., 1/n, 0: Wan's `get_sampling_sigmas`. Wan's UniPC starts at 0.999 and
                   diffusers' ends near 0.001 before the final 0, both otherwise the same.
        "simple"   ComfyUI's scheduler of that name: every (1000/n)-th of the 1000 training timesteps,
                   rounded to whole ones.

    Raises ValueError for values out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 step is needed.")
    if num_steps > NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_steps is {num_steps}; the model knows {NUM_TRAIN_TIMESTEPS} timesteps. Use fewer steps.")
    if spacing == "uniform":
        levels = [(num_steps - step) / num_steps for step in range(num_steps)]
    elif spacing == "simple":
        stride = NUM_TRAIN_TIMESTEPS / num_steps
        levels = [1.0 - int(step * stride) / NUM_TRAIN_TIMESTEPS for step in range(num_steps)]
    else:
        raise ValueError(f"spacing is {spacing!r}; expected one of {', '.join(SPACINGS)}.")
    sigmas = torch.tensor([shift_sigma(level, shift) for level in levels] + [0.0], dtype=torch.float32)
    return check_sigmas(sigmas)


def framepack_shift(num_tokens: int) -> float:
    """Return FramePack's mu for that many noisy tokens; exp(mu) is the shift.

    Linear from 0.5 at 256 tokens to 1.15 at 4096 as in Flux, at most ln 7. A section of height x width pixels has
    window * (height / 16) * (width / 16) noisy tokens. Source: lllyasviel/FramePack
    `diffusers_helper/pipelines/k_diffusion_hunyuan.py`. Raises ValueError for fewer than 1 token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; expected the number of noisy tokens of a section, at least 1.")
    return min(0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256), math.log(FRAMEPACK_MAX_SHIFT))


def framepack_sigmas(num_steps: int, mu: float, strength: float = 1.0) -> Tensor:
    """Return FramePack's noise levels, float32 [num_steps + 1] on the CPU, strictly decreasing to 0.

    sigma = e^mu / (e^mu + 1/t - 1) for t from 1 to 0; a `shift` given by the user is mu = ln(shift). `strength` below 1
    (video-to-video) multiplies every level, so the run starts at sigma = strength with all its steps, as FramePack
    does. Strength 0 is no step at all: the single level [0.], from which `sample_unipc_bh1` and `_bh2` return the
    input.
    Raises ValueError for values out of range.
    """
    if not math.isfinite(mu):
        raise ValueError(f"mu is {mu}; expected a finite number: ln(shift), or framepack_shift(noisy tokens).")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength is {strength}; expected 0 (keep the given video) to 1 (start from pure noise).")
    sigmas = flow_sigmas(num_steps, math.exp(mu))
    if strength == 0.0:
        return torch.zeros(1)
    return check_sigmas(sigmas * strength)


def sigmas_from_timesteps(timesteps: Sequence[float]) -> Tensor:
    """Return the noise levels of an explicit timestep list, float32 [len(timesteps) + 1], with the final 0 added.

    The list is one that is shifted already: that of distilled 4-step models (lightx2v, Lightning) is [1000, 937.5,
    833.3, 625], which equals `flow_sigmas(4, shift=5)`.

    Raises ValueError unless the list is strictly decreasing within (0, 1000].
    """
    values = [float(timestep) for timestep in timesteps]
    if not values:
        raise ValueError("The timestep list is empty; at least one timestep is needed.")
    if max(values) <= 1.0:
        raise ValueError(f"Timesteps {values} look like sigmas; timesteps are sigma x 1000, multiply them by 1000.")
    if min(values) <= 0.0 or max(values) > NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"Timesteps {values} leave the range above 0 and up to {NUM_TRAIN_TIMESTEPS}; the final 0 is added for you."
        )
    return check_sigmas(torch.tensor([*values, 0.0], dtype=torch.float64).div(NUM_TRAIN_TIMESTEPS).float())


def is_high_noise(sigma: Tensor, boundary: float) -> bool:
    """Tell whether the high-noise expert takes a step from `sigma` (0-d): timestep >= boundary * 1000, as in Wan 2.2.

    Raises ValueError unless `boundary` lies between 0 and 1.
    """
    if not 0.0 < boundary < 1.0:
        raise ValueError(f"boundary is {boundary}; expected a sigma between 0 and 1 (a timestep divided by 1000).")
    # Compared in the schedule's own precision: float32(0.9) is below the double 0.9, yet is that boundary.
    return bool(sigma >= torch.tensor(boundary, dtype=sigma.dtype, device=sigma.device))


def shift_sigma(sigma: float, shift: float) -> float:
    """Return shift * sigma / (1 + (shift - 1) * sigma) (arXiv:2403.03206, equation 23). ValueError if shift <= 0."""
    if not (math.isfinite(shift) and shift > 0.0):
        raise ValueError(
            f"shift is {shift}; expected a number above 0 (Wan uses 3 to 16; 1 leaves sigmas as they are)."
        )
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return the latent at `sigma`, (1 - sigma) * clean + sigma * noise."""
    return (1.0 - sigma) * clean + sigma * noise


def check_sigmas(sigmas: Tensor) -> Tensor:
    """Return `sigmas` if it is a 1-d floating list of two or more levels, strictly decreasing within [0, 1].

    Raises ValueError naming the first offending pair.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise ValueError(
            f"sigmas is {sigmas.dtype} {list(sigmas.shape)}; expected floating point [num_steps + 1] with at least "
            "one step."
        )
    levels = sigmas.tolist()
    if not (levels[0] <= 1.0 and levels[-1] >= 0.0):
        raise ValueError(f"sigmas run from {levels[0]} to {levels[-1]}; expected levels within 0 and 1.")
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        if not sigma > sigma_next:
            raise ValueError(
                f"sigmas[{index}] = {round(sigma, 6)} is followed by {round(sigma_next, 6)}; noise levels must "
                "strictly decrease. Use fewer steps, a milder shift, or sort the list."
            )
    return sigmas
