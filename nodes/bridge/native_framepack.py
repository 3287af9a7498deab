"""Our FramePack model inside ComfyUI's model of HunyuanVideo, whose latents and LoRA names it shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.patcher_extension
from torch import Tensor

from .block_patches import check_patches
from .carried import OBJECT, OPTION, PATCH, REPLACEMENT, TRANSFORMER, Carry
from .framepack_engine import FramePackEngine, SectionModel
from .native_model import NativeModel, core_model

PROMPT_KEY = "lowvram_prompt"  # of the conditions that say which prompt a pass is of

_BLOCKS = (
    "a node works on the network's blocks ({what}), which are other ones in FramePack: FramePack Sampler (Low VRAM) "
    "cannot do that, so take that node out"
)
REFUSALS = {
    Carry(TRANSFORMER, "easycache"): "EasyCache and LazyCache are not for FramePack Sampler (Low VRAM), which skips "
    "steps by its own use_teacache: switch that on, and take the node out",
    Carry(OBJECT, "latent_format"): "other latents are not for FramePack Sampler (Low VRAM): take the node out that "
    "sets them (ModelSamplingContinuousEDM)",
    Carry(OPTION, "context_handler"): "context windows are not for FramePack Sampler (Low VRAM): it makes a video of "
    "any length section by section anyway (latent_window_size), so take that node out",
    Carry(TRANSFORMER, "rope_options"): "other positions (ScaleROPE) are not for FramePack Sampler (Low VRAM), whose "
    "history has its places beside the video's: take that node out",
    **{
        Carry(kind, name): _BLOCKS.format(what=name)
        for kind, names in ((PATCH, ("double_block", "attn1_patch", "attn2_patch")), (REPLACEMENT, ("dit",)))
        for name in names
    },
}


def make_model(engine: FramePackEngine) -> comfy.model_base.BaseModel:
    """A model that LoRA loaders and memory management know; only FramePack Sampler samples it."""
    unknown = "this ComfyUI does not know HunyuanVideo, whose latents FramePack uses"
    return core_model(NativeFramePack(engine), {"image_model": "hunyuan_video"}, unknown)


class NativeFramePack(NativeModel):
    """Holds the network's layers, for LoRA loaders to find; within `sampling` it is what core's guider calls."""

    refusals = REFUSALS

    def __init__(self, engine: FramePackEngine):
        super().__init__(engine)
        config = engine.streamed.config
        self.framepack = engine
        self.in_channels = config.in_channels
        # what nodes for HunyuanVideo read
        self.params = SimpleNamespace(
            hidden_size=config.dim, num_heads=config.num_heads, axes_dim=list(config.rope_axes), theta=256
        )

    @contextmanager
    def sampling(self, section: SectionModel) -> Iterator[None]:
        """Core's guider samples this section in here."""
        self.framepack.section = section
        try:
            yield
        finally:
            self.framepack.section = None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The section's velocity; ValueError with the node to use, where one of ComfyUI's own samplers ends here."""
        options = {} if transformer_options is None else transformer_options
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, options, **inputs)

    def _forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None, transformer_options: dict[str, Any], **inputs: Any
    ) -> Tensor:
        section = self.framepack.section
        if section is None:
            self.framepack.check_latent(x)
            raise AssertionError("check_latent refuses every latent")
        check_patches(transformer_options)
        self.check_parts()
        if PROMPT_KEY not in inputs:
            raise ValueError(
                "a node (Perp-Neg) asks FramePack Sampler (Low VRAM) for a prompt of its own, and a run has prepared "
                "those of its positive and negative inputs alone: take that node out"
            )
        if inputs.get("control") is not None:
            raise ValueError(
                "a ControlNet is not for FramePack Sampler (Low VRAM), whose network has no place for it: take it out"
            )
        return section.velocity(x, inputs[PROMPT_KEY], transformer_options)
