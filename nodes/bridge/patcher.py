"""Our streamed model as a native MODEL: ComfyUI's ModelPatcher with our memory behind it.

Weights reach the device by the plan of the engine, at the first pass; core's hooks tell it when to start afresh and
when to give memory back. All clones share one model and one engine.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import comfy.model_base
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from . import host
from .engine import Engine
from .native_model import NativeModel
from .options import StreamOptions

WRAPPER_KEY = "lowvram"


class StreamedModelPatcher(comfy.model_patcher.ModelPatcher):
    """A MODEL whose weights the engine moves."""

    def __init__(
        self,
        model: comfy.model_base.BaseModel,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ):
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.options = StreamOptions()
        if not self.get_wrappers(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY):
            self.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, _check_latent)

    @property
    def engine(self) -> Engine[Any]:
        network = self.model.diffusion_model
        assert isinstance(network, NativeModel)
        return network.engine

    def clone(self, *args: Any, **kwargs: Any) -> StreamedModelPatcher:
        copy = super().clone(*args, **kwargs)
        copy.options = self.options
        return copy

    def with_options(self, **changes: Any) -> StreamedModelPatcher:
        """A clone that runs with these options of `StreamOptions` changed."""
        copy = self.clone()
        copy.options = dataclasses.replace(self.options, **changes)
        return copy

    # Sizes and places, as core asks for them

    def model_size(self) -> int:
        """The most that we would hold on the device: core evicts other models for so much."""
        budget = int(self.options.vram_budget_gb * 2**30)
        return min(self.engine.total_bytes, budget) if budget else self.engine.total_bytes

    def loaded_size(self) -> int:
        return self.engine.device_bytes

    def get_free_memory(self, device: torch.device) -> float:
        """What core may count on when it batches prompts: the same before and after our weights are loaded."""
        return host.free_vram(device) + self.engine.device_bytes

    # Loading and unloading

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Make this clone the one that runs. What it may use is decided by the plan, at the first pass."""
        if force_patch_weights:  # older ComfyUIs ask for weights to save in no other way
            self.engine.unload()  # core no longer counts it among what is loaded
            self.get_key_patches()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(unpatch_weights=False)
            self.patch_model(load_weights=False)
            self.engine.configure(self.options, self.patches, self.patches_uuid)
            self.model.current_weight_patches_uuid = self.patches_uuid
        return 0

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Free the device; the next pass plans anew for what is left then."""
        return self.engine.unload()

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Take object patches off; with `unpatch_weights` free device and pinned memory as well."""
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            self.engine.unload()
            self.model.current_weight_patches_uuid = None

    def unpin_all_weights(self) -> None:
        self.engine.unpin()

    # Weights, which are not where core would read them

    def get_key_patches(self, *arguments: Any, **named: Any) -> NoReturn:
        """ValueError: they cannot be saved or merged."""
        name = self.engine.streamed.checkpoint.path.name
        raise ValueError(
            f"{name} was opened by the LowVRAM loader, whose weights are in memory only while it runs, so it cannot be "
            "saved or merged: load it with ComfyUI's own loader for that, or use lowvram-video convert"
        )

    state_dict_for_saving = model_state_dict_for_saving = get_key_patches

    def set_injections(self, key: str, injections: Any) -> None:
        """Core's bypass LoRAs replace `forward` of layers that our blocks do not call."""
        if key == "bypass_lora":
            raise ValueError(
                "a LoRA in bypass mode (Load LoRA (Bypass)) is not supported by the LowVRAM loader: load it with Load "
                "LoRA, which changes no stored weight here either"
            )
        super().set_injections(key, injections)

    # Sampling

    def pre_run(self) -> None:
        super().pre_run()
        self.engine.begin_run()

    def cleanup(self) -> None:
        self.engine.end_run()
        super().cleanup()

    def patch_hooks(self, hooks: Any) -> None:
        """Core would swap weights between prompts: ours are not where it would write them."""
        if hooks is not None and self.get_combined_hook_patches(hooks):
            raise ValueError(
                "a LoRA that is hooked to a prompt (Create Hook LoRA) is not supported by the LowVRAM loader: "
                "load it with Load LoRA, or use ComfyUI's own diffusion model loader"
            )
        self.current_hooks = hooks


def make_patcher(model: comfy.model_base.BaseModel) -> StreamedModelPatcher:
    """The MODEL of ComfyUI's model around one of our networks."""
    engine = model.diffusion_model.engine
    return StreamedModelPatcher(model, engine.device, host.CPU, engine.total_bytes)


def _check_latent(executor: WrapperExecutor, noise: Tensor, *arguments: Any, **named: Any) -> Tensor:
    executor.class_obj.model_patcher.engine.check_latent(noise)
    return executor(noise, *arguments, **named)
