"""Our networks where ComfyUI's models have their own."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_base
import comfy.model_detection
from torch import nn

from .engine import Engine


class NativeModel(nn.Module):
    """Our network where core has its own. Its children are the engine's own modules."""

    def __init__(self, engine: Engine[Any]):
        super().__init__()
        self.engine = engine
        self.dtype = engine.streamed.model.execution.dtype
        for name, child in engine.streamed.model.named_children():
            self.add_module(name, child)


def core_model(network: NativeModel, entries: dict[str, Any], unknown: str) -> comfy.model_base.BaseModel:
    """ComfyUI's model around a network, of the variant that it tells from `entries` as from those of a checkpoint.

    ValueError, saying `unknown`, where this ComfyUI has no such model.
    """
    model_config = comfy.model_detection.model_config_from_unet_config(entries, {})
    if model_config is None:
        raise ValueError(f"{unknown}: update ComfyUI")
    model_config.unet_config["disable_unet_model_creation"] = True
    model_config.set_inference_dtype(network.dtype, None)
    model = model_config.get_model({}, "")
    model.diffusion_model = network
    model.eval().requires_grad_(False)
    network.engine.owner = weakref.ref(model)
    return model
