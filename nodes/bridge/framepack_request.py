"""What FramePack Sampler is given, as the engine takes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...framepack.network.config import IMAGE_TOKENS
from ...framepack.network.model import Prompt
from ...framepack.request import EncodedInputs, Sampling
from ...framepack.sections import SPATIAL_STRIDE
from . import host
from .framepack_conditioning import EndImageOptions, single_prompt_of, timed_prompt_of
from .framepack_engine import FramePackEngine
from .patcher import StreamedModelPatcher

LOADER = "Load FramePack Model (Low VRAM)"


@dataclass(frozen=True)
class SamplerInputs:
    """The node's inputs by their names. ValueError, from what is made of them, where one is no use."""

    model: Any
    positive: list[Any]
    total_second_length: float
    latent_window_size: int
    steps: int
    cfg: float
    guidance_scale: float
    shift: float
    seed: int
    use_teacache: bool
    teacache_rel_l1_thresh: float
    gpu_memory_preservation: float
    sampler: str
    denoise_strength: float
    cfg_rescale: float
    width: int
    height: int
    one_frame_index: int
    resume: bool
    filename_prefix: str
    image_embed_strength: float = 1.0
    negative: list[Any] | None = None
    start_latent: dict[str, Any] | None = None
    image_embeds: Any = None
    end_image: EndImageOptions | None = None
    initial_samples: dict[str, Any] | None = None
    extend_samples: dict[str, Any] | None = None
    vae: Any = None

    @cached_property
    def patcher(self) -> StreamedModelPatcher:
        """The MODEL, with the tighter of the budgets that this node and Block Swap give."""
        patcher = framepack_model(self.model)
        if not self.gpu_memory_preservation:
            return patcher
        budget = host.vram_without(self.gpu_memory_preservation, patcher.load_device)
        given = patcher.options.vram_budget_gb
        return patcher.with_options(vram_budget_gb=min(budget, given) if given else budget)

    def sampling(self) -> Sampling:
        return Sampling(
            seconds=self.total_second_length,
            mode=self.patcher.engine.streamed.mode,
            window=self.latent_window_size,
            num_steps=self.steps,
            sampler=self.sampler,
            guidance=self.guidance_scale,
            cfg=self.cfg,
            cfg_rescale=self.cfg_rescale,
            shift=self.shift,
            seed=self.seed,
            cache_threshold=self.teacache_rel_l1_thresh if self.use_teacache else None,
            strength=self.denoise_strength,
            one_frame=self.one_frame_index or None,
        )

    def inputs(self) -> EncodedInputs:
        config, latents = self.patcher.engine.streamed.config, partial(_network_latents, self.patcher.model)
        start = latents(self.start_latent, 1)
        initial, given = latents(self.initial_samples), latents(self.extend_samples)
        end = self.end_image or EndImageOptions(None, None, 1.0, "linear")
        sized = next((latent for latent in (start, given, initial) if latent is not None), None)
        size = self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE
        start_features = None if self.image_embeds is None else _features(self.image_embeds, "image_embeds")
        end_features = None if end.features is None else _features(end.features, "FramePack End Image's image_embeds")
        if start_features is not None:
            start_features = start_features * self.image_embed_strength
        elif end_features is None:  # the network always has some
            start_features = torch.zeros(1, IMAGE_TOKENS, config.image_dim)
        timed, prompts = timed_prompt_of(self.positive)
        inputs = EncodedInputs(
            latent_size=size if sized is None else (sized.shape[3], sized.shape[4]),
            timed=timed,
            prompts={name: _prompt(text, options) for name, text, options in prompts},
            negative=_prompt(*single_prompt_of(self.negative, "negative")) if self.negative else None,
            start=start,
            end=latents(end.latent, 1),
            start_features=start_features,
            end_features=end_features,
            start_strength=end.start_strength,
            interpolation=end.interpolation,
            initial=initial,
            given=given,
        )
        inputs.check_for(config)
        return inputs


def _network_latents(model: Any, latent: dict[str, Any] | None, num_frames: int | None = None) -> Tensor | None:
    """The network's fp32 latents `[1, 16, T, h, w]` on the CPU, of ComfyUI's; of a picture, one frame."""
    if latent is None:
        return None
    samples: Tensor = latent["samples"]
    if samples.ndim != 5 or samples.shape[1] != 16:
        raise ValueError(
            f"a latent has the shape {list(samples.shape)}; FramePack takes [1, 16, frames, height, width]: encode "
            "with hunyuan_video_vae"
        )
    latents: Tensor = model.process_latent_in(samples[:1].float().cpu())
    return latents[:, :, :num_frames]


def framepack_model(model: Any) -> StreamedModelPatcher:
    """The MODEL as ours; ValueError for any other."""
    if isinstance(model, StreamedModelPatcher) and isinstance(model.engine, FramePackEngine):
        return model
    raise ValueError(f"FramePack Sampler (Low VRAM) samples models of {LOADER}: load a FramePack file with that node")


def _prompt(text: Tensor, options: dict[str, Any]) -> Prompt:
    pooled = options.get("pooled_output")
    if pooled is None:
        raise ValueError(
            "a prompt has no pooled output: encode it with DualCLIPLoader (type hunyuan_video: llava_llama3 and clip_l)"
        )
    mask = options.get("attention_mask")
    text = text[:1] if mask is None else text[:1, mask[0].bool()]
    return Prompt(text.float().cpu(), pooled[:1].float().cpu())


def _features(seen: Any, title: str) -> Tensor:
    features: Tensor | None = seen.last_hidden_state
    if features is None:
        raise ValueError(
            f"{title} has no hidden states: encode the picture with CLIP Vision Encode and sigclip_vision_patch14_384"
        )
    return features[:1].float().cpu()
