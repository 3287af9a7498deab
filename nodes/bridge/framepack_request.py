"""What FramePack Sampler is given, as the engine takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...framepack.network.config import IMAGE_TOKENS
from ...framepack.network.model import Prompt
from ...framepack.request import MOST, NEGATIVE, EncodedInputs, Sampling
from ...framepack.run.generation import noise_shift
from ...framepack.section_work import POSITIVE, FramePackGuidance, Guide
from ...framepack.sections import SPATIAL_STRIDE
from . import host
from .carried import OPTION, TRANSFORMER, Carry, carried, without_own
from .framepack_conditioning import (
    GUIDED,
    TIMED_KEY,
    EndImageOptions,
    check_options,
    is_guided,
    timed_prompt_of,
)
from .framepack_engine import FramePackEngine
from .framepack_guide import CoreGuide, GuidedPrompt
from .framepack_schedule import given_shift
from .identity import identity
from .nag_options import NAG_KEY, NagOptions
from .patcher import StreamedModelPatcher
from .patches import patch_identity

# What changes nothing for ComfyUI's guider: containers, and what the plan and the loading hear.
PLAIN = {
    Carry(OPTION, "transformer_options"), Carry(OPTION, "torch_compile_kwargs"), Carry(TRANSFORMER, "wrappers"),
    Carry(TRANSFORMER, "callbacks"), Carry(TRANSFORMER, "patches"), Carry(TRANSFORMER, "patches_replace"),
}  # fmt: skip
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
    batch_place: int = 0

    @cached_property
    def patcher(self) -> StreamedModelPatcher:
        """The MODEL, with the tighter of the budgets that this node and Block Swap give."""
        patcher = framepack_model(self.model)
        if not self.gpu_memory_preservation:
            return patcher
        if not self.gpu_memory_preservation > 0:  # NaN too
            raise ValueError(f"gpu_memory_preservation is {self.gpu_memory_preservation}: use a number from 0 up")
        budget = host.vram_without(self.gpu_memory_preservation, patcher.load_device)
        given = patcher.options.vram_budget_gb
        return patcher.with_options(vram_budget_gb=min(budget, given) if given else budget)

    def videos(self) -> list[SamplerInputs]:
        """One for each latent of a batch: with its own pictures, and a seed that counts up by its place there."""
        end = self.end_image or EndImageOptions(None, None, 1.0, "linear")
        latents = {"start_latent": self.start_latent, "initial_samples": self.initial_samples}
        latents |= {"extend_samples": self.extend_samples, "end_image": end.latent}
        counts = {name: len(latent["samples"]) for name, latent in latents.items() if latent is not None}
        for name, seen in (("image_embeds", self.image_embeds), ("end_image's image_embeds", end.features)):
            if seen is not None and seen.last_hidden_state is not None:
                counts[name] = len(seen.last_hidden_state)
        most = max(counts.values(), default=1)
        for name, count in counts.items():
            if count not in (1, most):
                raise ValueError(
                    f"{name} is a batch of {count}, and another input of FramePack Sampler one of {most}: give one for "
                    "each video, or one for all"
                )
        known = [latent.get("batch_index") for latent in latents.values() if latent is not None]
        places = next((index for index in known if index is not None and len(index) == most), range(most))
        if most == 1 and places[0] == 0:
            return [self]
        return [self._video(index, place) for index, place in enumerate(places)]

    def _video(self, index: int, place: int) -> SamplerInputs:
        def one(latent: dict[str, Any] | None) -> dict[str, Any] | None:
            return latent and {
                name: value[index % len(value)][None] if isinstance(value, Tensor) and value.ndim == 5 else value
                for name, value in latent.items()
                if name != "batch_index"
            }

        def pictured(seen: Any) -> Any:
            if seen is None or seen.last_hidden_state is None:
                return seen
            states = seen.last_hidden_state
            return SimpleNamespace(last_hidden_state=states[index % len(states)][None])

        end = self.end_image
        if end is not None:
            end = replace(end, latent=one(end.latent), features=pictured(end.features))
        return replace(
            self,
            seed=(self.seed + place) % 2**64,
            batch_place=index,
            start_latent=one(self.start_latent),
            initial_samples=one(self.initial_samples),
            extend_samples=one(self.extend_samples),
            image_embeds=pictured(self.image_embeds),
            end_image=end,
        )

    @cached_property
    def guided(self) -> bool:
        """Whether anything is there that ComfyUI's own guider hears. ValueError for what nobody would."""
        self.patcher.check()
        for name, conditioning in (("positive", self.positive), ("negative", self.negative or [])):
            check_options(conditioning, name)
        nodes = any(carry not in PLAIN for carry in carried(self.patcher))
        return nodes or self._mask() is not None or is_guided(self.positive) or is_guided(self.negative or [])

    @property
    def nag(self) -> NagOptions | None:
        """The negative prompt of attention, where a node gave the MODEL one."""
        given: NagOptions | None = self.patcher.model_options["transformer_options"].get(NAG_KEY)
        return given

    def guide(self) -> Guide:
        """Who guides the sections."""
        if not self.guided:
            return FramePackGuidance()
        shift = noise_shift(self.sampling(), self.inputs().latent_size)
        return CoreGuide(self.patcher, self._guided_prompts(POSITIVE), self._guided_prompts(NEGATIVE), shift)

    def told(self) -> list[Any]:
        """What the result depends on of the nodes before this one, as JSON values and tensors.

        ValueError where one of them cannot be told from others.
        """
        patches = patch_identity(self.patcher.patches)
        if not self.guided:
            return patches
        options = {key: value for key, value in self.patcher.model_options.items() if key != "transformer_options"}
        options["transformer"] = self.patcher.model_options.get("transformer_options", {})
        prompts = [prompt.options for kind in (POSITIVE, NEGATIVE) for prompt in self._guided_prompts(kind)]
        heard = [{key: value for key, value in options.items() if key in GUIDED} for options in prompts]
        scale = getattr(self.patcher.get_model_object("model_sampling"), "noise_scale", 1.0)
        code = (options, without_own(self.patcher.wrappers), self.patcher.callbacks, heard, scale)
        return [*patches, identity(code)]

    def _guided_prompts(self, kind: str) -> list[GuidedPrompt]:
        """The entries of the positive or the negative conditioning; a schedule of prompts is one of them."""
        conditioning = self.positive if kind == POSITIVE else self.negative or []
        if any(TIMED_KEY in options for _, options in conditioning):
            conditioning = conditioning[:1]
        names = [kind, *(f"{kind} {index}" for index in range(2, len(conditioning) + 1))]
        return [GuidedPrompt(name, text, options) for name, (text, options) in zip(names, conditioning, strict=False)]

    def _beside(self) -> list[GuidedPrompt]:
        """The prompts that are neither the schedule's nor the first negative one."""
        return [*self._guided_prompts(POSITIVE)[1:], *self._guided_prompts(NEGATIVE)[1:]]

    def _mask(self) -> Tensor | None:
        """Where `initial_samples` are made anew, `[1, 1, T, h, w]`; None: everywhere."""
        latent = self.initial_samples
        mask = None if latent is None else latent.get("noise_mask")
        if latent is None or mask is None:
            return None
        whole = comfy.utils.reshape_mask(mask.float().cpu(), latent["samples"].shape)
        return whole[self.batch_place % len(whole) : self.batch_place % len(whole) + 1, :1]

    def sampling(self) -> Sampling:
        if not 0.0 <= self.image_embed_strength <= 1.0:  # ComfyUI lets NaN by
            raise ValueError(f"image_embed_strength is {self.image_embed_strength}: use a number from 0 to 1")
        return Sampling(
            seconds=self.total_second_length,
            mode=self.patcher.engine.streamed.mode,
            window=self.latent_window_size,
            num_steps=self.steps,
            sampler=self.sampler,
            guidance=self.guidance_scale,
            cfg=self.cfg,
            cfg_rescale=self.cfg_rescale,
            shift=given_shift(self.patcher, self.shift),
            seed=self.seed,
            cache_threshold=self.teacache_rel_l1_thresh if self.use_teacache else None,
            strength=self.denoise_strength,
            one_frame=self.one_frame_index or None,
            nag=None if self.nag is None else self.nag.settings,
        )

    def inputs(self) -> EncodedInputs:
        config, latents = self.patcher.engine.streamed.config, partial(_network_latents, self.patcher.model)
        end = self.end_image or EndImageOptions(None, None, 1.0, "linear")
        for name, latent in (("start", self.start_latent), ("extend", self.extend_samples), ("end", end.latent)):
            if latent is None:
                continue
            if name != "extend":
                _check_picture(name, latent)
            if latent.get("noise_mask") is not None:
                raise ValueError(
                    f"the {name} latent has a noise mask, which FramePack Sampler hears of initial_samples alone: take "
                    "Set Latent Noise Mask out, or connect that video as initial_samples"
                )
        start = latents(self.start_latent, 1)
        initial, given = latents(self.initial_samples), latents(self.extend_samples)
        sized = next((latent for latent in (start, given, initial) if latent is not None), None)
        size = self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE
        start_features = None if self.image_embeds is None else _features(self.image_embeds, "image_embeds")
        end_features = None if end.features is None else _features(end.features, "FramePack End Image's image_embeds")
        if start_features is not None:
            start_features = start_features * self.image_embed_strength
        elif end_features is None:  # the network always has some
            start_features = torch.zeros(1, IMAGE_TOKENS, config.image_dim)
        timed, prompts = timed_prompt_of(self.positive)
        negative = None
        if self.negative:
            text, options = self.negative[0]
            negative = _prompt(text, options, self.batch_place)
        inputs = EncodedInputs(
            latent_size=size if sized is None else (sized.shape[3], sized.shape[4]),
            timed=timed,
            prompts={name: _prompt(text, options, self.batch_place) for name, text, options in prompts},
            negative=negative,
            start=start,
            end=latents(end.latent, 1),
            start_features=start_features,
            end_features=end_features,
            start_strength=end.start_strength,
            interpolation=end.interpolation,
            initial=initial,
            given=given,
            initial_mask=self._mask(),
            others={each.name: _prompt(each.text, each.options, self.batch_place) for each in self._beside()},
            guided=self.guided,
            nag=None if self.nag is None else _prompt(self.nag.text, self.nag.options),
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


def _check_picture(name: str, latent: Mapping[str, Any]) -> None:
    """ValueError for a video where a picture is wanted."""
    samples = latent["samples"]
    if samples.ndim == 5 and samples.shape[2] > 1:
        raise ValueError(
            f"the {name} latent is a video of {samples.shape[2]} latents, and FramePack takes one picture there: "
            "encode one picture, or connect the video as initial_samples, or as extend_samples (F1 models)"
        )


def framepack_model(model: Any) -> StreamedModelPatcher:
    """The MODEL as ours; ValueError for any other."""
    if isinstance(model, StreamedModelPatcher) and isinstance(model.engine, FramePackEngine):
        return model
    raise ValueError(f"FramePack Sampler (Low VRAM) samples models of {LOADER}: load a FramePack file with that node")


def _prompt(text: Tensor, options: Mapping[str, Any], place: int = 0) -> Prompt:
    """The prompt of a video of a batch; a CONDITIONING has one for each, or one for all."""
    pooled = options.get("pooled_output")
    if pooled is None:
        raise ValueError(
            "a prompt has no pooled output: encode it with DualCLIPLoader (type hunyuan_video: llava_llama3 and clip_l)"
        )
    mask, guidance = options.get("attention_mask"), options.get("guidance")
    if guidance is not None and not 0 <= guidance <= MOST:
        raise ValueError(f"a prompt's guidance (FluxGuidance) is {guidance}: use a number from 0 to {MOST:g}")
    text = text[place % len(text)]
    if mask is not None:
        text = text[mask[place % len(mask)].bool()]
    pooled = pooled[place % len(pooled)][None]
    return Prompt(text[None].float().cpu(), pooled.float().cpu(), None if guidance is None else float(guidance))


def _features(seen: Any, title: str) -> Tensor:
    features: Tensor | None = seen.last_hidden_state
    if features is None:
        raise ValueError(
            f"{title} has no hidden states: encode the picture with CLIP Vision Encode and sigclip_vision_patch14_384"
        )
    return features[:1].float().cpu()
