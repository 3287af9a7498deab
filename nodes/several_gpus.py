"""The node that shares a model's passes between the GPUs of one machine."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..runtime.cards import AUTO, cards_beside
from .bridge import host
from .inputs import model_input, streamed_model

logger = logging.getLogger(__name__)

TITLE = "Several GPUs (Low VRAM)"
SPLIT = "split the video"
MODES = (AUTO, SPLIT)


class SeveralGPUs(io.ComfyNode):
    """A MODEL that several cards run together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMSeveralGPUs",
            display_name=TITLE,
            description="One video on several GPUs of this machine, in the one ComfyUI: each card has part of every "
            "step, and one copy of the weights in RAM feeds them all. Works on Windows too.",
            search_aliases=["multi gpu", "multigpu", "two gpus", "several gpus", "distorch", "raylight", "dual gpu"],
            inputs=[
                model_input(),
                io.String.Input(
                    "devices", default=AUTO,
                    tooltip="auto: all GPUs of this machine. Or a list such as cuda:0,cuda:1, in which the GPU that "
                    "ComfyUI runs on must be.",
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), default=AUTO,
                    tooltip="split the video: each card computes part of every step; with guidance on two cards one "
                    "has the prompt and the other the negative prompt. auto: the same.",
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, devices: str, mode: str) -> io.NodeOutput:
        patcher = streamed_model(model, TITLE)
        others = cards_beside(patcher.engine.device, devices)
        if not others:
            logger.info("%s: there is one GPU, which makes the video alone", TITLE)
        return io.NodeOutput(patcher.with_options(others=others))
