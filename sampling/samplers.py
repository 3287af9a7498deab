"""Solvers of the flow-matching probability-flow ODE; every solver has one shape.

A solver sees the model only through `denoise(x, sigma)`. With alpha = 1 - sigma, the exponential-integrator
factors of the published solvers reduce to sigma_next / sigma for x and 1 - sigma_next / sigma for the denoised
latent, so every step below is one interpolation towards some estimate of the clean latent.

Solvers are deterministic functions of their arguments. Coefficients are Python floats (double precision) and the
latent is kept in float32 (float64 stays float64) whatever the model computes in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from .schedules import add_noise
from .solver import Denoiser, OnStep, Sampler, prepare, report, step_towards
from .unipc import sample_unipc_bh1, sample_unipc_bh2

# At sigma = 1 the log signal-to-noise ratio is -inf; diffusers' UniPC clamps sigma by the same amount.
LARGEST_FINITE_SIGMA = 1.0 - 1e-6
# Below this count diffusers and Wan take the last second-order step at first order, for stability.
FEW_STEPS = 15


def sample_euler(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None, generator: Generator | None = None
) -> Tensor:
    """First order: follow the velocity in a straight line. See `Sampler` for arguments and errors.

    Lipman et al. 2022 (arXiv:2210.02747); Esser et al. 2024 (arXiv:2403.03206). Equals diffusers'
    FlowMatchEulerDiscreteScheduler.
    """
    x, sigmas, levels = prepare(x, sigmas)
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigmas[index]).to(x.dtype)
        x = step_towards(denoised, x, sigma, sigma_next)
        report(on_step, index, levels, x, denoised)
    return x


def sample_dpmpp_2m(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None, generator: Generator | None = None
) -> Tensor:
    """DPM-Solver++(2M), second order, one evaluation a step. See `Sampler` for arguments and errors.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2, midpoint form on the flow path. Equals diffusers'
    DPMSolverMultistepScheduler with `use_flow_sigmas` and Wan's `fm_solvers.py`: the first step, the step to
    sigma 0, and the last of fewer than 15 steps are first order.
    """
    x, sigmas, levels = prepare(x, sigmas)
    num_steps = len(levels) - 1
    previous: Tensor | None = None
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigmas[index]).to(x.dtype)
        final = index == num_steps - 1 and (sigma_next == 0.0 or num_steps < FEW_STEPS)
        target = denoised
        if previous is not None and not final:
            target = _extrapolate(denoised, previous, levels[index - 1], sigma, sigma_next)
        x = step_towards(target, x, sigma, sigma_next)
        previous = denoised
        report(on_step, index, levels, x, denoised)
    return x


def sample_unipc(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None, generator: Generator | None = None
) -> Tensor:
    """Wan's UniPC, order 2 (bh2, data prediction): each new evaluation also corrects the step that led to it.

    See `Sampler` for arguments and errors. Zhao et al. 2023 (arXiv:2302.04867). Equals diffusers'
    UniPCMultistepScheduler with `use_flow_sigmas` and Wan's `fm_solvers_unipc.py`: the first and the last step
    predict at first order, and nothing corrects the last one.
    """
    x, sigmas, levels = prepare(x, sigmas)
    num_steps = len(levels) - 1
    history: list[Tensor] = []  # denoised latents of the last two levels, newest last
    start = x  # where the step that led to the present x began
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigmas[index]).to(x.dtype)
        if history:
            target = _correct(denoised, history, levels[max(0, index - 2) : index + 1])
            x = step_towards(target, start, levels[index - 1], sigma)
        target = denoised
        if history and index < num_steps - 1:
            # With bh2 the second-order predictor is that of DPM-Solver++(2M).
            target = _extrapolate(denoised, history[-1], levels[index - 1], sigma, sigma_next)
        start, x = x, step_towards(target, x, sigma, sigma_next)
        history = [*history[-1:], denoised]
        report(on_step, index, levels, x, denoised)
    return x


def sample_lcm(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None, generator: Generator | None = None
) -> Tensor:
    """Multistep consistency sampling: denoise fully, then add fresh noise up to the next level. For distilled models.

    Luo et al. 2023 (arXiv:2310.04378), on the flow path as in ComfyUI's `sample_lcm`. Noise is drawn in float32 on
    the generator's device, so a CPU generator gives one result on every machine.
    See `Sampler` for arguments; raises ValueError for malformed sigmas or a missing generator.
    """
    if generator is None:
        raise ValueError("The lcm sampler adds noise at every step: pass torch.Generator().manual_seed(seed).")
    x, sigmas, levels = prepare(x, sigmas)
    for index, sigma_next in enumerate(levels[1:]):
        denoised = denoise(x, sigmas[index]).to(x.dtype)
        x = denoised
        if sigma_next > 0.0:
            noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32)
            x = add_noise(denoised, noise.to(x), sigma_next)
        report(on_step, index, levels, x, denoised)
    return x


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": sample_euler,
        "unipc": sample_unipc,
        "dpm++_2m": sample_dpmpp_2m,
        "lcm": sample_lcm,
        "unipc_bh1": sample_unipc_bh1,
        "unipc_bh2": sample_unipc_bh2,
    }
)


def select_sampler(name: str) -> Sampler:
    """Return the solver of that name. ValueError lists the names there are."""
    if name not in SAMPLERS:
        raise ValueError(f"Sampler {name!r} does not exist; choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]


def _half_log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma), the time variable in which the multistep solvers are polynomial."""
    sigma = min(sigma, LARGEST_FINITE_SIGMA)
    return math.log((1.0 - sigma) / sigma)


def _extrapolate(denoised: Tensor, previous: Tensor, sigma_previous: float, sigma: float, sigma_next: float) -> Tensor:
    """Denoised latent in the middle of the coming step, on the line through the last two (in lambda)."""
    past = _half_log_snr(sigma) - _half_log_snr(sigma_previous)
    coming = _half_log_snr(sigma_next) - _half_log_snr(sigma)
    return denoised + (0.5 * coming / past) * (denoised - previous)


def _correct(denoised: Tensor, history: list[Tensor], levels: list[float]) -> Tensor:
    """Target that redoes the step levels[-2] -> levels[-1] with `denoised`, evaluated at its end (UniC, bh2).

    `history` holds the denoised latents at levels[:-1]: one for a first-order correction, two for a second-order one.
    """
    start = history[-1]
    if len(history) == 1:
        return start + 0.5 * (denoised - start)
    before, begin, end = (_half_log_snr(sigma) for sigma in levels)
    h = end - begin
    ratio = (before - begin) / h  # r_1, negative
    # The order conditions of UniPC's theorem 3.1: [[1, 1], [ratio, 1]] @ (weight_before, weight_end) = (b_1, b_2).
    base = math.expm1(-h)
    phi_2 = base / -h - 1.0
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / base, 2.0 * phi_3 / base
    weight_before = (b_1 - b_2) / (1.0 - ratio)
    weight_end = b_1 - weight_before
    return start + (weight_before / ratio) * (history[0] - start) + weight_end * (denoised - start)
