"""UniPC of order 3 for flow matching, as FramePack samples: every new evaluation corrects the step that led to it.

Zhao et al. 2023 (arXiv:2302.04867), data prediction. The flow ODE dx/dsigma = (x - clean) / sigma becomes
dx/dlambda = clean - x in the time variable lambda = -log(sigma), which is finite at pure noise. So one step is

    x_next = exp(-h) x + h * integral over u in [0, 1] of exp(-h (1 - u)) clean(lambda + u h)

for h = lambda_next - lambda, with clean(lambda) interpolated through the denoised latents of known levels. The paper's
order conditions are those of this integral; its function B(h) drops out of them except where it fixes the one free
coefficient at 1/2 (UniP-2 and UniC-1): B = h is bh1, B = 1 - exp(-h) is bh2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from .solver import Denoiser, OnStep, prepare, report, step_towards

MAX_ORDER = 3

Known = tuple[float, Tensor]  # a level (sigma) and the denoised latent there


def sample_unipc_bh1(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None, generator: Generator | None = None
) -> Tensor:
    """UniPC with B(h) = h, FramePack's default; order min(3, num_steps - 1), one evaluation a step.

    See `Sampler` for arguments and errors. A run to sigma 0 returns its last denoised latent. `sigmas` of a single
    level has no step: x is returned and nothing is evaluated (video-to-video at strength 0).
    """
    return _sample(denoise, x, sigmas, on_step, lambda h: h)


def sample_unipc_bh2(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None, generator: Generator | None = None
) -> Tensor:
    """UniPC with B(h) = 1 - exp(-h); otherwise as `sample_unipc_bh1`.

    Differs from `sample_unipc` by its order, its time variable and a last step that is corrected too.
    """
    return _sample(denoise, x, sigmas, on_step, lambda h: -math.expm1(-h))


def _sample(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None, scale: Callable[[float], float]
) -> Tensor:
    if sigmas.ndim == 1 and len(sigmas) == 1:
        return x.to(torch.promote_types(x.dtype, torch.float32))
    x, sigmas, levels = prepare(x, sigmas)
    order = max(1, min(MAX_ORDER, len(levels) - 2))
    history: list[Known] = []  # the last `order` levels, newest last
    start = x  # where the step that led to the present x began
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigmas[index]).to(x.dtype)
        if sigma_next == 0.0:
            x = denoised  # lambda is infinite there, and so is the pull towards the clean latent
        else:
            if history:
                x = _advance(start, history, [(sigma, denoised)], sigma, scale)
            history = [*history, (sigma, denoised)][-order:]
            start, x = x, _advance(x, history, [], sigma_next, scale)
        report(on_step, index, levels, x, denoised)
    return x


def _advance(
    x: Tensor, history: list[Known], ahead: list[Known], sigma_next: float, scale: Callable[[float], float]
) -> Tensor:
    """Move x from the newest level of `history` to sigma_next; `ahead` holds that level's denoised latent if known."""
    sigma, anchor = history[-1]
    others = [*history[:-1], *ahead]
    h = math.log(sigma / sigma_next)
    moments = _moments(h, len(others) + 1)
    ratios = [math.log(sigma / level) / h for level, _ in others]  # places in the step: u = 1 is its end
    target = anchor
    for weight, (_, denoised) in zip(_weights(ratios, moments, scale(h)), others, strict=True):
        target = target + (weight / moments[0]) * (denoised - anchor)
    return step_towards(target, x, sigma, sigma_next)


def _weights(ratios: list[float], moments: list[float], scale: float) -> list[float]:
    """Return the weight of each difference to the newest denoised latent, for differences at u = ratios."""
    if len(ratios) == 1:
        return [0.5 * scale / ratios[0]]
    if not ratios:
        return []
    places = torch.tensor(ratios, dtype=torch.float64)
    powers = torch.stack([places**power for power in range(1, len(ratios) + 1)])
    solution: list[float] = torch.linalg.solve(powers, torch.tensor(moments[1:], dtype=torch.float64)).tolist()
    return solution


def _moments(h: float, count: int) -> list[float]:
    """Return h * integral over u in [0, 1] of exp(-h (1 - u)) u^k for k = 0 .. count - 1, h above 0."""
    if h >= 1.0:
        moments = [-math.expm1(-h)]
        for k in range(1, count):
            moments.append(1.0 - (k / h) * moments[-1])  # by parts
        return moments
    # The recursion above cancels for short steps; their Taylor series is exact in 20 terms.
    return [_taylor_moment(h, k) for k in range(count)]


def _taylor_moment(h: float, k: int) -> float:
    term = h / (k + 1)
    total = term
    for j in range(1, 20):
        term *= -h / (k + j + 1)
        total += term
    return total
