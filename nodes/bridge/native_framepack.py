"""Our FramePack model inside ComfyUI's model of HunyuanVideo, whose latents and LoRA names it shares."""

from __future__ import annotations

from typing import Any

import comfy.model_base
from torch import Tensor

from .framepack_engine import FramePackEngine
from .native_model import NativeModel, core_model


def make_model(engine: FramePackEngine) -> comfy.model_base.BaseModel:
    """A model that LoRA loaders and memory management know; only FramePack Sampler samples it."""
    unknown = "this ComfyUI does not know HunyuanVideo, whose latents FramePack uses"
    return core_model(NativeFramePack(engine), {"image_model": "hunyuan_video"}, unknown)


class NativeFramePack(NativeModel):
    """Holds the network's layers, for LoRA loaders to find."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Samplers of ComfyUI's end here: ValueError says which node to use."""
        self.engine.check_latent(arguments[0])
        raise AssertionError("check_latent refuses every latent")
