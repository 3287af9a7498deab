"""FramePack's sections guided by ComfyUI: all that nodes gave the MODEL and its prompts is heard as core hears it.

A section is sampled by core's own guider, whose model is the section: wrappers, guidance functions, ranges, masks and
noise masks are core's code, applied to what FramePack denoises. The solver and the noise levels stay FramePack's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ...framepack.section_work import SectionWork
from ...sampling.guidance import rescale_to_cond
from .attention_patches import attention_of
from .framepack_engine import FramePackEngine
from .native_framepack import PROMPT_KEY, NativeFramePack
from .patcher import StreamedModelPatcher


@dataclass(frozen=True)
class GuidedPrompt:
    """One entry of a CONDITIONING, and the name by which the run knows its prompt."""

    name: str
    text: Tensor
    options: dict[str, Any]


@dataclass(frozen=True)
class CoreGuide:
    """A `Guide` by ComfyUI's guider, for these prompts."""

    patcher: StreamedModelPatcher
    positive: Sequence[GuidedPrompt]
    negative: Sequence[GuidedPrompt]
    shift: float

    def sample(self, work: SectionWork) -> Tensor:
        """See `Guide`."""
        patcher = self._prepared(work)
        engine, network = patcher.engine, patcher.network
        assert isinstance(engine, FramePackEngine) and isinstance(network, NativeFramePack)
        names = [prompt.name for prompt in (*self.positive, *self.negative)]
        guider = comfy.samplers.CFGGuider(patcher)
        conds = {"positive": self._conds(self.positive, 0)}
        if self.negative:
            conds["negative"] = self._conds(self.negative, len(self.positive))
        guider.inner_set_conds(conds)
        guider.set_cfg(work.sampling.cfg)
        model = patcher.model
        latent = torch.zeros_like(work.noise) if work.initial is None else model.process_latent_out(work.initial)
        with network.sampling(_SectionModel(work, names, engine)):
            made = guider.sample(
                work.noise, latent, _Solver(work), work.sigmas, denoise_mask=work.mask, disable_pbar=True,
                seed=work.sampling.seed,
            )  # fmt: skip
        return model.process_latent_in(made)

    def _prepared(self, work: SectionWork) -> StreamedModelPatcher:
        """The MODEL with the schedule of this run, and FramePack's rescaled guidance as the first of its functions."""
        patcher = self.patcher.clone()
        sampling = patcher.get_model_object("model_sampling")
        own = copy.deepcopy(sampling)
        by_logarithm = isinstance(own, comfy.model_sampling.ModelSamplingFlux)
        own.set_parameters(shift=math.log(self.shift) if by_logarithm else self.shift)
        patcher.add_object_patch("model_sampling", own)
        rescale, options = work.sampling.cfg_rescale, patcher.model_options
        if rescale and work.sampling.cfg != 1.0:

            def rescaled(given: dict[str, Any]) -> Tensor:
                x = given["input"]
                return x - rescale_to_cond(x - given["denoised"], x - given["cond_denoised"], rescale)

            options["sampler_post_cfg_function"] = [rescaled, *options.get("sampler_post_cfg_function", [])]
        return patcher

    def _conds(self, prompts: Sequence[GuidedPrompt], first: int) -> list[Any]:
        entries = []
        for index, prompt in enumerate(prompts, first):
            marker = comfy.conds.CONDRegular(torch.tensor([[index]]))
            entries.append([prompt.text[:1], {**prompt.options, "model_conds": {PROMPT_KEY: marker}}])
        return entries


class _Solver(comfy.samplers.Sampler):
    """FramePack's sampler in the place of one of core's; a noise mask keeps the given video where it is 0.

    There `x` is the given video under the noise of the level, before each step, and the given video after it.
    """

    def __init__(self, work: SectionWork):
        self._work = work

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        schedule = model_wrap.inner_model.model_sampling
        options = extra_args["model_options"]
        latent = torch.zeros_like(noise) if latent_image is None else latent_image

        def noised(sigma: Tensor) -> Tensor:
            return schedule.noise_scaling(sigma, noise, latent, False)

        def denoise(x: Tensor, level: Tensor) -> Tensor:
            sigma = level.to(x.device, torch.float32).reshape(1)
            if denoise_mask is None:
                return model_wrap(x, sigma, **extra_args)
            mask, change = denoise_mask, options.get("denoise_mask_function")
            if change is not None:
                mask = change(sigma, mask, extra_options={"model": model_wrap, "sigmas": sigmas})
            x = x * mask + noised(sigma) * (1.0 - mask)
            return model_wrap(x, sigma, **extra_args) * mask + latent * (1.0 - mask)

        return self._work.solve(denoise, noised(sigmas[:1]))


class _SectionModel:
    """The section as the network that core calls: prompts by their number, each with its step cache."""

    def __init__(self, work: SectionWork, names: Sequence[str], engine: FramePackEngine):
        self._work, self._names, self._engine = work, names, engine
        self._cached: set[tuple[str, int]] = set()  # a step cache is of one pass of a prompt in a step

    def velocity(self, x: Tensor, prompt: Tensor, options: dict[str, Any]) -> Tensor:
        """`[B, 16, T, h, w]` for the prompts of these numbers, one after the other."""
        if x.shape[2:] != self._work.noise.shape[2:]:
            raise ValueError(
                f"a node shows FramePack a part of a section, {list(x.shape[2:])} of "
                f"{list(self._work.noise.shape[2:])} (frames, height, width), whose history is of the whole: take that "
                "node out (context windows, areas)"
            )
        sigma = options["sigmas"].reshape(-1)[0]
        own = self._engine.streamed.model.execution.attention
        attention = attention_of(options, own)
        with nullcontext() if attention is own else self._engine.attending(attention):
            parts = [
                self._one(part, self._names[int(index)], sigma)
                for part, index in zip(x.split(1), prompt.flatten().tolist(), strict=True)
            ]
        return torch.cat(parts)

    def _one(self, x: Tensor, prompt: str, sigma: Tensor) -> Tensor:
        place = prompt, self._work.step_of(float(sigma))
        cached = place not in self._cached
        self._cached.add(place)
        return self._work.velocity(prompt, x, sigma, cached=cached)
