"""One section to sample: what it begins from, what the network says of it, and who guides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..sampling.caching.framepack import TeaCache
from ..sampling.guidance import RescaledGuidance
from ..sampling.samplers import select_sampler
from ..sampling.solver import Denoiser, OnStep
from ..transformer.block_cache import BlockCache
from .request import NEGATIVE, Sampling
from .sections import Section

POSITIVE = "positive"  # the schedule's prompt of a section, or its mix of several; others begin with it

# (prompt, noisy latents [1, 16, T, h, w], step, its cache) -> velocity
PromptVelocity = Callable[[str, Tensor, int, BlockCache | None], Tensor]


@dataclass
class StepCaches:
    """A step cache for each prompt of a step, as their signals differ; None where every step is computed."""

    make: Callable[[], TeaCache] | None
    by_prompt: dict[str, TeaCache] = field(default_factory=dict)

    @classmethod
    def of(cls, sampling: Sampling) -> StepCaches:
        threshold = sampling.cache_threshold
        if threshold is None or sampling.strength == 0.0:
            return cls(None)
        return cls(partial(TeaCache, sampling.num_steps, threshold))

    def at(self, prompt: str, step: int) -> TeaCache | None:
        if self.make is None:
            return None
        cache = self.by_prompt.setdefault(prompt, self.make())
        cache.begin_step(step)
        return cache

    def begin_section(self) -> None:
        for cache in self.by_prompt.values():
            cache.begin_section()


@dataclass(frozen=True)
class SectionWork:
    """A section: its `noise [1, 16, T, h, w]`, and the given video there (`initial`, kept where `mask` is 0).

    `sigmas` are its noise levels, `others` the prompts beside the schedule's by name. All is on the CPU, in fp32.
    """

    section: Section
    sampling: Sampling
    sigmas: Tensor
    noise: Tensor
    initial: Tensor | None
    mask: Tensor | None
    others: Mapping[str, object]
    predict: PromptVelocity
    caches: StepCaches
    report: OnStep
    device: torch.device

    def velocity(self, prompt: str, x: Tensor, sigma: Tensor, *, cached: bool = True) -> Tensor:
        """The network's velocity at one of the noise levels; `cached` lets a step be skipped. ValueError for others."""
        step = self.step_of(float(sigma))
        return self.predict(prompt, x, step, self.caches.at(prompt, step) if cached else None)

    def step_of(self, sigma: float) -> int:
        """The step that has this noise level."""
        step = int((self.sigmas[:-1] - sigma).abs().argmin())
        if abs(float(self.sigmas[step]) - sigma) > 1e-4:
            raise ValueError(
                f"a node asks FramePack for a noise level of {sigma:.4f}, which is none of this run's steps: take that "
                "node out"
            )
        return step

    def solve(self, denoise: Denoiser, x: Tensor) -> Tensor:
        """The latents that the sampler makes of `x`, by what denoises."""
        return select_sampler(self.sampling.sampler)(denoise, x, self.sigmas, self.report)


class Guide(Protocol):
    """Samples a section by guidance of its own."""

    def sample(self, work: SectionWork) -> Tensor:
        """The section's latents `[1, 16, T, h, w]`."""
        ...


class FramePackGuidance:
    """FramePack's own: classifier-free guidance, rescaled."""

    def sample(self, work: SectionWork) -> Tensor:
        x = work.noise if work.initial is None else torch.lerp(work.initial, work.noise, float(work.sigmas[0]))
        uncond = partial(work.velocity, NEGATIVE) if NEGATIVE in work.others else None
        settings = work.sampling
        denoise = RescaledGuidance(partial(work.velocity, POSITIVE), uncond, settings.cfg, settings.cfg_rescale)
        return work.solve(denoise, x.to(work.device))
