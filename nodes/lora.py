"""The node that opens a LoRA file by every name that our models' layers go by."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..weights.lora.file import Lora, LowRankPair, open_lora
from .bridge import host
from .bridge.engine import Engine
from .bridge.patches import PREFIX
from .inputs import model_input, streamed_model

logger = logging.getLogger(__name__)

NAME = "Load LoRA (Low VRAM)"


class LoadLora(io.ComfyNode):
    """Adds a LoRA to a streamed model, as ComfyUI's own patches."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadLora",
            display_name=NAME,
            description="Adds a LoRA and says how much of it applied. It knows more names than ComfyUI's Load LoRA, "
            "such as those of HunyuanVideo's LoRAs on FramePack, and combines with it.",
            search_aliases=["lora", "load lora", "hunyuan lora", "framepack lora", "low vram"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "lora_name", options=host.model_files(host.LORA_FOLDER, (".safetensors",)),
                    tooltip="A .safetensors file in models/loras that was made for this model. FramePack takes LoRAs "
                    "for FramePack and for HunyuanVideo.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-100.0, max=100.0, step=0.01,
                    tooltip="1: as it was trained. 0: not at all. Another strength costs nothing: no weight is read "
                    "again.",
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, strength: float, **_: Any) -> str:
        return f"{host.model_stamp(lora_name, host.LORA_FOLDER)} {strength}"

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        patcher = streamed_model(model, NAME)
        engine = patcher.engine
        path = host.model_path(lora_name, host.LORA_FOLDER)
        lora = open_lora(path, engine.streamed.checkpoint.tensors, engine.streamed.aliases)
        logger.log(logging.WARNING if lora.report.skipped else logging.INFO, "LoRA %s", lora.report)
        copy = patcher.clone()
        if strength:
            file = (str(path), host.model_stamp(lora_name, host.LORA_FOLDER))
            copy.add_patches(_Patches(engine, lora, file).all(), strength)
        return io.NodeOutput(copy, ui=ui.PreviewText(str(lora.report)))


class _Patches:
    """A LoRA as ComfyUI's patches of its model's tensors; `file` tells the version of the file."""

    def __init__(self, engine: Engine[Any], lora: Lora, file: tuple[str, str]):
        self._known, self._tensors = engine.lora_tensors, engine.streamed.checkpoint.tensors
        self._lora, self._file = lora, file

    def all(self) -> dict[str, Any]:
        """By ComfyUI's key."""
        patches = {f"{PREFIX}{layer}.weight": self._pair(layer, pair) for layer, pair in self._lora.pairs.items()}
        for name, difference in self._lora.differences.items():
            values = self._lora.difference(difference).view(self._shape(name))
            patches[f"{PREFIX}{name}"] = host.difference_patch(values)
        return patches

    def _pair(self, layer: str, pair: LowRankPair) -> Any:
        # several layers may have rows of one `up`, and share one `down`
        up = self._once((layer, "up"), lambda: self._lora.up(pair))
        down = self._once((pair.down,), lambda: self._lora.down(pair))
        magnitude = None if pair.magnitude is None else self._lora.magnitude(pair)
        if magnitude is not None:  # a square weight has as many columns as rows: the stored shape tells
            by_row = magnitude.shape[0] == self._shape(f"{layer}.weight")[0]
            magnitude = magnitude.reshape(-1, 1) if by_row else magnitude.reshape(1, -1)
        return host.lora_patch(up, down, pair.scale * pair.rank, magnitude)

    def _once(self, name: tuple[str, ...], read: Callable[[], Tensor]) -> Tensor:
        key = (*self._file, *name)
        tensor = self._known.get(key)
        if tensor is None:
            tensor = self._known[key] = read()
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        info = self._tensors[name]
        return info.logical_shape or info.shape
