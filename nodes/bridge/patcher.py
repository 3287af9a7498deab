"""Our streamed model as a native MODEL: ComfyUI's ModelPatcher with our memory behind it.

Weights reach the device by the plan of the engine, at the first pass; core's hooks tell it when to start afresh and
when to give memory back. All clones share one model and one engine.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, NoReturn

import comfy.model_base
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor

from ...runtime.latent_watch import BadLatents, LatentWatch
from ...system.sizes import GIB
from . import host
from .card_patcher import card_patchers
from .carried import BYPASS, HOOKED, OWN, check_carried
from .compile_patches import COMPILE_KEY, compile_settings
from .engine import Engine
from .inside import check_dtype, is_inside
from .moving_preview import moving_preview
from .native_model import NativeModel, PartValueError, absent
from .options import StreamOptions

logger = logging.getLogger(__name__)

WRAPPER_KEY = OWN
CARDS_KEY = f"{OWN}_cards"
OTHER_DEVICE = (
    "a model of the LowVRAM loader runs on the GPU that ComfyUI was started with (--cuda-device) and those of Several "
    "GPUs (Low VRAM), and on no other device: take Select Model Device or MultiGPU CFG Split out, or load the file "
    "with ComfyUI's own loader"
)


class StreamedModelPatcher(comfy.model_patcher.ModelPatcher):
    """A MODEL whose weights the engine moves."""

    object_patches: dict[str, Any]

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
            self.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, _watched)

    @property
    def network(self) -> NativeModel:
        network = self.model.diffusion_model
        assert isinstance(network, NativeModel)
        return network

    @property
    def engine(self) -> Engine[Any]:
        return self.network.engine

    def clone(self, *args: Any, **kwargs: Any) -> StreamedModelPatcher:
        """A MODEL with the same model and engine. ValueError where one with weights of its own is asked for."""
        if kwargs.get("force_deepcopy", False):
            raise ValueError(
                "a LoRA is trained (Train LoRA) on weights that stay where they are, and a model of the LowVRAM loader "
                "streams them: load the file with ComfyUI's own loader for that"
            )
        copy = super().clone(*args, **kwargs)
        copy.options = self.options
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """ValueError: the copy would have no weights to change."""
        raise ValueError(
            "a node copies this model with all its weights to change them, and a model of the LowVRAM loader streams "
            "them from its file: load the file with ComfyUI's own loader for that"
        )

    def deepclone_multigpu(self, *arguments: Any, **named: Any) -> NoReturn:
        """ValueError: the engine has one device."""
        raise ValueError(OTHER_DEVICE)

    def with_options(self, **changes: Any) -> StreamedModelPatcher:
        """A clone that runs with these options of `StreamOptions` changed."""
        copy = self.clone()
        copy.options = dataclasses.replace(self.options, **changes)
        copy.set_additional_models(CARDS_KEY, card_patchers(self.engine, copy.options.cards))
        return copy

    # Sizes and places, as core asks for them

    def model_size(self) -> int:
        """The most that we would hold on the device: core evicts other models for so much."""
        budget = int(self.options.vram_budget_gb * GIB)
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
            self.configure()
            self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, 0, force_patch_weights, True)
        return 0

    def configure(self) -> None:
        """Have the engine run as this clone says, from the next pass on."""
        self.engine.configure(self.run_options, self.patches, self.patches_uuid)

    def patch_model(self, *arguments: Any, **named: Any) -> comfy.model_base.BaseModel:
        """Put object patches in their places, but for those of the network, which does what they ask for itself."""
        self.check()
        self.network.inside = self.network.read_inside(self.object_patches)
        given = self.object_patches
        self.object_patches = {path: value for path, value in given.items() if not is_inside(path)}
        try:
            return super().patch_model(*arguments, **named)
        finally:
            self.object_patches = given

    def check(self) -> None:
        """ValueError, by its name, for the first thing that a node gave this MODEL and a run would leave out."""
        if self.load_device != self.engine.device:
            raise ValueError(OTHER_DEVICE)
        check_carried(self, self.network.refusals)
        check_dtype(self.object_patches, self.network.dtype)
        self.network.read_inside(self.object_patches)
        self.network.check_parts()

    def get_model_object(self, name: str) -> Any:
        """A part of the model by its path. ValueError for one that core's network has and ours has not."""
        try:
            return super().get_model_object(name)
        except AttributeError as error:
            if isinstance(error, PartValueError) or not is_inside(name):
                raise
            raise absent(name) from error

    @property
    def run_options(self) -> StreamOptions:
        """The options of a run: also those that other packs' nodes set by their own ways."""
        compiled = compile_settings(self.model_options)
        return self.options if compiled is None else dataclasses.replace(self.options, compile=compiled)

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        """Core's torch.compile of the network or its blocks is done our way: see `run_options`."""
        if key != COMPILE_KEY:
            super().add_wrapper_with_key(wrapper_type, key, wrapper)

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

    state_dict_for_saving = model_state_dict_for_saving = patch_weight_to_device = get_key_patches

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Tensor]:
        """The weights' names and shapes. ValueError where those below a prefix are asked for: that is to save them."""
        if filter_prefix is not None:
            self.get_key_patches()
        return super().model_state_dict()

    def set_injections(self, key: str, injections: Any) -> None:
        """Core's bypass LoRAs replace `forward` of layers that our blocks do not call."""
        if key == "bypass_lora":
            raise ValueError(BYPASS)
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
            raise ValueError(HOOKED)
        self.current_hooks = hooks


def make_patcher(model: comfy.model_base.BaseModel) -> StreamedModelPatcher:
    """The MODEL of ComfyUI's model around one of our networks."""
    engine = model.diffusion_model.engine
    return StreamedModelPatcher(model, engine.device, host.CPU, engine.total_bytes)


def _watched(
    executor: WrapperExecutor,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Callable[..., None] | None = None,
    *more: Any,
    **named: Any,
) -> Tensor:
    """Core's `outer_sample`: a latent that the model cannot sample is refused, and what it samples is looked at.

    Where that is no use it is made once more: on the safe path, or else from the steps that are kept of it
    (`resumable`). BadLatents where it is none even so.
    """
    patcher = executor.class_obj.model_patcher
    patcher.check()
    engine = patcher.engine
    engine.check_latent(noise)

    def sample() -> Tensor:
        watch = LatentWatch(engine.streamed.likely_cause())

        def told(step: int, denoised: Any, latent: Any, num_steps: int) -> None:
            engine.sampler_steps.done(step)
            if isinstance(denoised, Tensor) and isinstance(latent, Tensor):
                watch.step(step, num_steps, denoised, latent)
            if callback is not None:
                callback(step, denoised, latent, num_steps)
                preview.show(denoised)

        with moving_preview(patcher.model.latent_format, engine) as preview:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, told, *more, **named)

    try:
        return sample()
    except BadLatents as error:
        if engine.streamed.take_safe_path():
            logger.warning("%s: it is sampled anew with exact attention", error)
        elif error.num_kept:
            logger.warning("%s: it is sampled anew from the %d calls of the model before", error, error.num_kept)
        else:
            raise
    return sample()
