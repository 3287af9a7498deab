"""The node that opens a LoRA file by every name that our models' layers go by."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..weights.files.checkpoint import CheckpointError
from ..weights.lora.file import open_lora
from ..weights.lora.fingerprint import lora_fingerprint
from ..weights.lora.sound import check_strengths
from .bridge import host
from .bridge.lora_patches import LoraPatches
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
        return f"{lora_stamp(lora_name)} {strength}"

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        patcher = streamed_model(model, NAME)
        check_strengths([strength], [lora_name])  # ComfyUI lets NaN by
        engine = patcher.engine
        path = host.model_path(lora_name, host.LORA_FOLDER)
        lora = open_lora(path, engine.streamed.checkpoint.tensors, engine.streamed.aliases)
        logger.log(logging.WARNING if lora.report.skipped else logging.INFO, "LoRA %s", lora.report)
        copy = patcher.clone()
        if strength:
            file = (str(path), lora_stamp(lora_name))
            patches = LoraPatches(engine, lora, file)
            copy.add_patches(patches.updates(), strength)
            copy.add_patches(patches.changes(), strength)
        return io.NodeOutput(copy, ui=ui.PreviewText(str(lora.report)))


def lora_stamp(name: str | None) -> str:
    """Changes when the LoRA does, or the configuration beside it that may say its scale."""
    stamp = host.model_stamp(name, host.LORA_FOLDER)
    if name is None or stamp == "missing":
        return stamp
    try:
        return lora_fingerprint(host.model_path(name, host.LORA_FOLDER))
    except CheckpointError:  # what is wrong with it is said when the node runs
        return stamp
