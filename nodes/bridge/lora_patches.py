"""A LoRA file as ComfyUI's weight patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.weight_adapter
from torch import Tensor

from ...weights.lora.file import Lora, LowRankPair
from .engine import Engine
from .patches import PREFIX


class LoraPatches:
    """A LoRA as ComfyUI's patches of its model's tensors; `file` tells the version of the file."""

    def __init__(self, engine: Engine[Any], lora: Lora, file: tuple[str, str]):
        self._known, self._tensors = engine.lora_tensors, engine.streamed.checkpoint.tensors
        self._lora, self._file = lora, file

    def all(self) -> dict[str, Any]:
        """By ComfyUI's key."""
        patches = {f"{PREFIX}{layer}.weight": self._pair(layer, pair) for layer, pair in self._lora.pairs.items()}
        for name, difference in self._lora.differences.items():
            values = self._lora.difference(difference).view(self._shape(name))
            patches[f"{PREFIX}{name}"] = ("diff", (values,))
        return patches

    def _pair(self, layer: str, pair: LowRankPair) -> Any:
        # several layers may have rows of one `up`, and share one `down`
        up = self._once((layer, "up"), lambda: self._lora.up(pair))
        down = self._once((pair.down,), lambda: self._lora.down(pair))
        magnitude = None if pair.magnitude is None else self._lora.magnitude(pair)
        if magnitude is not None:  # a square weight has as many columns as rows: the stored shape tells
            by_row = magnitude.shape[0] == self._shape(f"{layer}.weight")[0]
            magnitude = magnitude.reshape(-1, 1) if by_row else magnitude.reshape(1, -1)
        return comfy.weight_adapter.LoRAAdapter(set(), (up, down, pair.scale * pair.rank, None, magnitude, None))

    def _once(self, name: tuple[str, ...], read: Callable[[], Tensor]) -> Tensor:
        key = (*self._file, *name)
        tensor = self._known.get(key)
        if tensor is None:
            tensor = self._known[key] = read()
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        info = self._tensors[name]
        return info.logical_shape or info.shape
