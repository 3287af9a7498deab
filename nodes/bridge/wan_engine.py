"""A Wan model under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...memory.plan.footprint import WorkSize
from ...memory.plan.plan import MemoryPlan, PlanError
from ...runtime.settings import RunSettings
from ...runtime.turns import Turns
from ...sampling.caching.sampler_steps import Call
from ...sampling.caching.settings import StepCacheSettings
from ...wanvideo.footprint import WanWork, wan_work, with_residuals
from ...wanvideo.network.model import Extras
from ...wanvideo.step_tables import choose_table
from ...wanvideo.streamed import StreamedWan
from .engine import Engine
from .options import StreamOptions
from .step_cache import check_no_other, moment_in


class WanEngine(Engine[StreamedWan]):
    """Planned at the first pass of a run, for the size that it has."""

    def __init__(self, path: Path, settings: RunSettings, turns: Turns | None = None, vace_module: Path | None = None):
        super().__init__(partial(StreamedWan, vace_module=vace_module), path, settings, turns)
        self._new_run = True

    def begin_run(self, phase: str | None = "denoise") -> None:
        super().begin_run(phase)
        self._new_run = True

    def work_size(self, latent_size: Sequence[int]) -> WanWork:
        """The work of a pass over one sample's latent of `latent_size` (frames, height, width)."""
        frames, height, width = latent_size
        time, down, across = wan_work(self.streamed.config, (1, 1, 1)).stride
        return wan_work(self.streamed.config, (width * across, height * down, (frames - 1) * time + 1))

    def video_work(self, width: int, height: int, frames: int, passes_per_step: int) -> WorkSize:
        return wan_work(self.streamed.config, (width, height, frames), passes_per_step=passes_per_step)

    def preview(self, work: WorkSize, options: StreamOptions, card_gb: float = 0.0) -> MemoryPlan:
        cache = options.step_cache
        if cache is not None and cache.residuals != "ram":
            try:
                return super().preview(with_residuals(work, True), options, card_gb)
            except PlanError:
                if cache.residuals == "vram":
                    raise
        return super().preview(work, options, card_gb)

    def choose_attention(self, shape: Sequence[int]) -> None:
        """Have the fastest attention for latents of a shape `[B, C, T, H, W]`, where the choice is ours."""
        self.streamed.choose_attention(self.work_size(shape[2:]).tokens)

    def check_step_cache(self, settings: StepCacheSettings) -> None:
        choose_table(settings, self.streamed.config, self.streamed.checkpoint.path).check(settings.method)

    def use_step_cache(self, settings: StepCacheSettings | None) -> None:
        self.streamed.use_step_cache(settings)

    def at_step(self, transformer_options: Mapping[str, Any]) -> Call | None:
        call = super().at_step(transformer_options)
        if self.streamed.step_cache is not None:
            check_no_other({"transformer_options": transformer_options})
            if call is not None:
                self.streamed.at_moment(moment_in(call, getattr(self._owner(), "model_sampling", None)))
        return call

    def check_latent(self, latent: Tensor) -> None:
        wanted = self.streamed.config.out_channels
        if latent.ndim != 5 or latent.shape[1] != wanted:
            vae = "wan2.2_vae (Wan22ImageToVideoLatent)" if wanted == 48 else "wan_2.1_vae (EmptyHunyuanLatentVideo)"
            raise ValueError(
                f"the latent has the shape {list(latent.shape)}, but this Wan model takes video latents of {wanted} "
                f"channels: make it with {vae}"
            )

    def embed_text(self, text: Tensor) -> Tensor:
        """A prompt `[B, tokens, text_dim]` as the network reads it, also between runs."""
        with self.returning_memory():
            return self.streamed.embed_text(text)

    def run(
        self, latent: Tensor, timestep: Tensor, text: Tensor, image_tokens: Tensor | None, extras: Extras
    ) -> Tensor:
        """The velocity (see `WanModel.forward`). Memory is returned when it fails or is interrupted."""
        with self.returning_memory():
            self._start(latent, extras)
            assert self.streamed.plan is not None
            batch = self.streamed.plan.work.batch
            with self.within_budget():
                if latent.shape[0] <= batch:
                    return self._velocity(latent, timestep, text, image_tokens, extras)
                velocities = []
                for first in range(0, latent.shape[0], batch):
                    part = slice(first, first + batch)
                    image = None if image_tokens is None else image_tokens[part]
                    cut = extras.cut(part)
                    velocities.append(self._velocity(latent[part], timestep[part], text[part], image, cut))
                return torch.cat(velocities)

    def _velocity(
        self, latent: Tensor, timestep: Tensor, text: Tensor, image_tokens: Tensor | None, extras: Extras
    ) -> Tensor:
        own = self.streamed.model.execution.attention
        attention = extras.visitor.attention(own)
        with nullcontext() if attention is own else self.attending(attention):
            return self.streamed(latent, timestep, text, image_tokens, extras)

    def _start(self, latent: Tensor, extras: Extras) -> None:
        """Have the model on the device, planned for this work."""
        frames, height, width = latent.shape[2:]
        size = (frames + (extras.reference is not None), height, width)
        wanted = self._steered(self.work_size(size), extras)
        plan, new_run, self._new_run = self.streamed.plan, self._new_run, False
        if plan is not None and self.streamed.started:
            planned = plan.work
            assert isinstance(planned, WanWork)
            same = planned.latent_size == size and planned.batch == latent.shape[0]
            goes_on = planned.covers(wanted) and (same or (not new_run and plan.has_room_for(wanted)))
            if goes_on and not (new_run and self.could_be_faster(plan)):
                return
        self.choose_attention(latent.shape)
        self.prepare()
        self.start(self._plan_batch(wanted, latent.shape[0]))

    def _steered(self, work: WanWork, extras: Extras) -> WanWork:
        """The same work with what steers its passes, or looks at them."""
        own = self.streamed.model.execution.attention
        seen = extras.visitor.sees_attention
        return replace(
            work,
            controls=max(1, len(extras.vace_frames)),
            nag=extras.nag is not None,
            seen_queries=seen,
            all_queries=seen or extras.visitor.attention(own) is not own,
        )

    def _plan_batch(self, work: WanWork, batch: int) -> MemoryPlan:
        """A plan for a batch of such samples, or for one at a time where only that fits."""
        beside = int(work.nag)  # prompts that have keys and values, and no pass
        # a single sample: cond and uncond probably come one after the other
        single = replace(work, batch=1, passes_per_step=2 + beside)
        if batch == 1:
            return self.plan(single)
        try:
            return self.plan(replace(work, batch=batch, passes_per_step=1 + beside))
        except PlanError:
            return self.plan(single)
