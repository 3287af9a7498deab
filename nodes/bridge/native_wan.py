"""Our Wan model with the call signature of ComfyUI's own, for its BaseModel, samplers and patches.

Core builds the model around a network (latent format, conditioning, schedule); here it is handed ours. Parameters
have the official names, so LoRA keys fit, and lie on the meta device but while the engine runs.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.ldm.common_dit
import comfy.model_base
import comfy.patcher_extension
import torch
from comfy.ldm.flux.layers import EmbedND
from torch import Tensor, nn

from ...wanvideo.network.config import WanConfig
from ...wanvideo.network.embeddings import AxisPositions
from ...wanvideo.network.model import Extras
from .block_patches import SUPPORTED, BlockPatches, check_patches
from .nag_options import wan_nag
from .native_model import NativeModel, core_model
from .step_cache import prompts_of
from .wan_engine import WanEngine

# Core's estimate of activations, from which it frees VRAM and batches prompts, is for its own model.
ACTIVATION_SHARE = 0.4


def make_model(engine: WanEngine) -> comfy.model_base.BaseModel:
    """ComfyUI's model of this variant around the engine's network."""
    config = engine.streamed.config
    unknown = (
        f"{engine.streamed.checkpoint.path.name}: this ComfyUI does not know a Wan model of type {config.model_type} "
        f"with {config.in_channels} channels"
    )
    model = core_model(NativeWan(engine), _core_config(config), unknown)
    model.memory_usage_factor *= ACTIVATION_SHARE
    return model


class NativeWan(NativeModel):
    """What core's BaseModel calls."""

    rotates, guides = True, True
    called = ("head", "patch_embedding", "time_embedding")
    text_embedding: Any

    def __init__(self, engine: WanEngine):
        super().__init__(engine)
        self.wan = engine
        config = engine.streamed.config
        self.dim, self.patch_size = config.dim, config.patch_size
        # what nodes read, and replace, of core's network
        self.num_heads, self.num_layers, self.ffn_dim = config.num_heads, config.num_layers, config.ffn_dim
        self.in_dim, self.out_dim, self.text_dim = config.in_channels, config.out_channels, config.text_dim
        self.text_embedding = TextEmbedding(engine, self.text_embedding)
        third = 2 * (config.head_dim // 6)
        self.rope_embedder = EmbedND(config.head_dim, 10000, [config.head_dim - 2 * third, third, third])

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Velocity `[B, out, T, H, W]` for noisy latents and core's conditioning."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, clip_fea, time_dim_concat, options, **inputs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        check_patches(options, SUPPORTED)
        self.check_parts()
        frames, height, width = x.shape[2:]
        latent = self._pad(x)
        if time_dim_concat is not None:
            latent = torch.cat([latent, self._pad(time_dim_concat)], dim=2)
        velocity = self._original(latent, timestep, context, clip_fea=clip_fea, transformer_options=options, **inputs)
        return velocity[:, :, :frames, :height, :width]

    def _original(self, *arguments: Any, **inputs: Any) -> Tensor:
        """`forward_orig`, or what a node put in its place; ValueError where that needs core's own parts."""
        try:
            return self.forward_orig(*arguments, **inputs)
        except (AttributeError, KeyError, NotImplementedError, TypeError) as error:
            if "forward_orig" not in vars(self):
                raise
            raise ValueError(
                "a node (such as TeaCache or MagCache) replaces diffusion_model.forward_orig by code that needs "
                f"ComfyUI's own network ({error}), which is not supported by the LowVRAM loader: use Step Cache (Low "
                "VRAM)"
            ) from error

    def forward_orig(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        freqs: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Velocity for padded latents, where core's network has its own and nodes put theirs; `freqs` are our own."""
        options = {} if transformer_options is None else transformer_options
        self._check_prompt(context, clip_fea)
        extras = self._extras(inputs, options, x)
        self.wan.at_step(options)
        if extras.reference is not None and t.ndim == 2:
            t = torch.cat([t[:, :1], t], dim=1)
        return self.wan.run(x, t, context, clip_fea, extras)

    def _check_prompt(self, text: Tensor, seen: Tensor | None) -> None:
        """ValueError for text and pictures of other encoders than this model's."""
        config = self.wan.streamed.config
        if text.shape[-1] != config.text_dim:
            raise ValueError(
                f"a prompt has {text.shape[-1]} features a token, and this Wan model of the LowVRAM loader reads "
                f"{config.text_dim}: encode it with umt5-xxl (Load CLIP, type wan)"
            )
        if seen is not None and config.image_dim and seen.shape[-1] != config.image_dim:
            raise ValueError(
                f"the CLIP vision output has {seen.shape[-1]} features, and this Wan model of the LowVRAM loader reads "
                f"{config.image_dim}: encode the picture with clip_vision_h"
            )
        if seen is not None and config.image_pos_tokens and seen.shape[1] > config.image_pos_tokens:
            raise ValueError(
                f"the CLIP vision output has {seen.shape[1]} tokens, and this Wan model of the LowVRAM loader reads "
                f"{config.image_pos_tokens}: give it those of the first and the last picture alone"
            )

    def _pad(self, latent: Tensor) -> Tensor:
        return comfy.ldm.common_dit.pad_to_patch_size(latent, self.patch_size)

    def _extras(self, inputs: dict[str, Any], transformer_options: dict[str, Any], latent: Tensor) -> Extras:
        if inputs.get("context_latents") is not None:
            raise ValueError(
                "latents as in-context references are not supported by the LowVRAM loader: leave that node out"
            )
        config = self.wan.streamed.config
        strengths = inputs.get("vace_strength") or ()
        if bad := [strength for strength in strengths if not math.isfinite(strength)]:
            raise ValueError(f"WanVaceToVideo's strength is {bad[0]}: use a finite number, such as 1")
        vace = inputs.get("vace_context") if config.vace_layers else None  # [B, N, C, T, H, W]
        reference = inputs.get("reference_latent") if config.reference_channels else None
        return Extras(
            vace_frames=() if vace is None else tuple(self._pad(frames) for frames in vace.unbind(1)),
            vace_strengths=() if vace is None else tuple(strengths),
            reference=reference,
            camera=inputs.get("camera_conditions") if config.camera_channels else None,
            positions=_positions(transformer_options),
            rotate=self.inside.rotate,
            nag=wan_nag(transformer_options, self.inside.nag, latent.shape[0]),
            visitor=BlockPatches(transformer_options, latent, config, reference is not None),
            prompts=prompts_of(transformer_options, latent.shape[0]),
        )


class TextEmbedding(nn.Sequential):
    """The network's text embedding as nodes call it between runs, when its weights are not on the device."""

    def __init__(self, engine: WanEngine, layers: nn.Module):
        super().__init__(*layers.children())
        self.engine = engine

    def to(self, *arguments: Any, **named: Any) -> TextEmbedding:
        """Nothing: its weights come when they are wanted."""
        return self

    def forward(self, text: Tensor) -> Tensor:
        """`[B, tokens, text_dim] -> [B, tokens, dim]`."""
        return self.engine.embed_text(text)


def _positions(transformer_options: dict[str, Any]) -> AxisPositions:
    given = transformer_options.get("rope_options") or {}
    scale_t, scale_y, scale_x = (float(given.get(f"scale_{axis}", 1.0)) for axis in "tyx")
    shift_t, shift_y, shift_x = (float(given.get(f"shift_{axis}", 0.0)) for axis in "tyx")
    return AxisPositions((scale_t, scale_y, scale_x), (shift_t, shift_y, shift_x))


def _core_config(config: WanConfig) -> dict[str, Any]:
    """The entries by which core tells the variants of Wan apart."""
    model_type = "i2v" if config.image_dim else "t2v"
    if config.vace_layers:
        model_type = "vace"
    elif config.camera_channels:
        model_type = "camera" if config.image_dim else "camera_2.2"
    return {
        "image_model": "wan2.1",
        "model_type": model_type,
        "dim": config.dim,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
    }
