"""A LoRA file as ComfyUI's weight patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import comfy.weight_adapter
import torch
from torch import Tensor

from ...weights.files.lora_keys import DOWN, MAGNITUDE
from ...weights.lora.attach import is_small
from ...weights.lora.file import Lora
from ...weights.lora.low_rank import LowRankPair
from ...weights.lora.update import Additive, Difference, Replacement, Update
from .engine import Engine
from .patches import PREFIX


class MergedUpdate(comfy.weight_adapter.WeightAdapterBase):
    """An update that is merged as the command line merges it; `tensors` are those that it reads, by key."""

    name = "lowvram_video"

    def __init__(self, update: Update, tensors: Mapping[str, Tensor]):
        self.update, self.tensors = update, tensors
        self.loaded_keys = set(tensors)
        self.weights = [repr(update), *tensors.values()]  # what a result depends on

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        self.update.merge_(weight, self.tensors.__getitem__, strength)
        return weight


class LoraPatches:
    """A LoRA as ComfyUI's patches of its model's tensors; `file` tells the version of the file."""

    def __init__(self, engine: Engine[Any], lora: Lora, file: tuple[str, str]):
        self._known, self._tensors = engine.lora_tensors, engine.streamed.checkpoint.tensors
        self._lora, self._file = lora, file

    def updates(self) -> dict[str, Any]:
        """By ComfyUI's key, what changes layers' weights."""
        return {f"{PREFIX}{layer}.weight": self._update(layer, update) for layer, update in self._lora.updates.items()}

    def changes(self) -> dict[str, Any]:
        """By ComfyUI's key, what is added to tensors or takes their place."""
        return {f"{PREFIX}{name}": self._change(name, change) for name, change in self._lora.changes.items()}

    def _update(self, layer: str, update: Update) -> Any:
        read = self._lora.checkpoint.read
        rows, *others = self._tensors[f"{layer}.weight"].unpacked_shape
        columns = torch.Size(others).numel()
        beside = isinstance(update, Additive) and update.factors_rank and is_small(update, rows, columns)
        if not isinstance(update, Additive) or not (beside or isinstance(update, LowRankPair)):
            return MergedUpdate(update, {key: self._once((key,), partial(read, key)) for key in update.keys.values()})
        # several layers may have rows of one `up`, and share one `down`
        up = self._once((layer, "up"), lambda: update.up(read))
        down = self._once((update.keys.get(DOWN, layer), "down"), lambda: update.down(read))
        magnitude = update.magnitude(read, rows, columns) if MAGNITUDE in update.keys else None
        return comfy.weight_adapter.LoRAAdapter(set(), (up, down, update.scale * update.rank, None, magnitude, None))

    def _change(self, name: str, change: Difference | Replacement) -> Any:
        values = change.values(self._lora.checkpoint.read).view(self._tensors[name].unpacked_shape)
        if isinstance(change, Replacement):
            return "set", (values,)
        return "diff", (values if change.scale == 1.0 else values * change.scale,)

    def _once(self, name: tuple[str, ...], read: Callable[[], Tensor]) -> Tensor:
        key = (*self._file, *name)
        tensor = self._known.get(key)
        if tensor is None:
            tensor = self._known[key] = read()
        return tensor
