"""Our networks where ComfyUI's models have their own."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import comfy.model_base
import comfy.model_detection
from torch import nn

from .carried import Refusals
from .engine import Engine
from .inside import Inside, read_inside


class PartValueError(AttributeError, ValueError):
    """A node asks for a part that core's network has and ours has not."""

    __module__ = "lowvram_video"


class EntryValueError(KeyError, ValueError):
    """The same of an entry that core has for checkpoints of another architecture."""

    __module__ = "lowvram_video"

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows it in quotes


def absent(part: str) -> PartValueError:
    """What is raised for a part, by its name or path."""
    return PartValueError(
        f"a node asks this model for its part {part!r}, which a model of the LowVRAM loader does not have: "
        "take that node out, or load the file with ComfyUI's own loader"
    )


class CoreEntries(dict[str, Any]):
    """By which core tells a checkpoint's variant, and which nodes read."""

    def __missing__(self, name: str) -> NoReturn:
        raise EntryValueError(
            f"a node asks this model for its {name!r}, which models of this architecture do not have: take that node "
            "out, it is for others than those of the LowVRAM loader"
        )


class NativeModel(nn.Module):
    """Our network where core has its own. Its children are the engine's own modules.

    `inside` is what runs in the place of parts that nodes replaced, of the MODEL that was loaded last.
    """

    rotates, guides = False, False  # what of `inside` it does
    refusals: Refusals = {}  # what it leaves out beside what nobody hears
    called: Collection[str] = ()  # parts that it calls as core's network does, so that a node may change them

    def __init__(self, engine: Engine[Any]):
        super().__init__()
        self.engine = engine
        self.inside = Inside()
        self.dtype = engine.streamed.model.execution.dtype
        for name, child in engine.streamed.model.named_children():
            self.add_module(name, child)

    def read_inside(self, patches: Mapping[str, Any]) -> Inside:
        """What these object patches ask for. ValueError for what is not done here."""
        return read_inside(patches, self.rotates, self.guides)

    @cached_property
    def _parts(self) -> Sequence[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self.named_modules() if name and name not in self.called]

    def check_parts(self) -> None:
        """ValueError for a part that a node changed in its place, which our blocks would never call."""
        for name, module in self._parts:
            changed = vars(module)
            if "forward" in changed or changed["_forward_hooks"] or changed["_forward_pre_hooks"]:
                raise ValueError(
                    f"a node replaces the forward of diffusion_model.{name}, or hooks onto it, which is not supported "
                    "by the LowVRAM loader: take that node out and load the model anew, or load the file with "
                    "ComfyUI's own loader"
                )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise absent(name) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine.streamed.checkpoint.path.name})"  # not every layer of it


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
    model_config.unet_config = CoreEntries(model_config.unet_config)
    model.eval().requires_grad_(False)
    network.engine.owner = weakref.ref(model)
    return model
