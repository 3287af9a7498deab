"""Our FramePack model inside ComfyUI's model of HunyuanVideo, whose latents and LoRA names it shares."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_base
import comfy.model_detection
from torch import Tensor

from .framepack_engine import FramePackEngine
from .native_wan import NativeModel


def make_model(engine: FramePackEngine) -> comfy.model_base.BaseModel:
    """A model that LoRA loaders and memory management know; only FramePack Sampler samples it."""
    model_config = comfy.model_detection.model_config_from_unet_config({"image_model": "hunyuan_video"}, {})
    if model_config is None:
        raise ValueError("this ComfyUI does not know HunyuanVideo, whose latents FramePack uses: update ComfyUI")
    model_config.unet_config["disable_unet_model_creation"] = True
    model_config.set_inference_dtype(engine.streamed.model.execution.dtype, None)
    model = model_config.get_model({}, "")
    model.diffusion_model = NativeFramePack(engine)
    model.eval().requires_grad_(False)
    engine.owner = weakref.ref(model)
    return model


class NativeFramePack(NativeModel):
    """Holds the network's layers, for LoRA loaders to find."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Samplers of ComfyUI's end here: ValueError says which node to use."""
        self.engine.check_latent(arguments[0])
        raise AssertionError("check_latent refuses every latent")
