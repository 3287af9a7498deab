"""The node that shares a model's passes between the GPUs of one machine."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..memory.plan.parking import Amount, ParkSpec, parse_parking
from ..runtime.cards import AUTO, cards_beside
from ..runtime.parked import find_parking
from .bridge import host
from .inputs import ADVANCED, model_input, streamed_model

logger = logging.getLogger(__name__)

TITLE = "Several GPUs (Low VRAM)"
SPLIT, PARK = "split the video", "park blocks"
MODES = (AUTO, SPLIT, PARK)


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
                    "has the prompt and the other the negative prompt. park blocks: ComfyUI's GPU computes alone, and "
                    "the others' memory holds blocks in place of RAM. auto: split the video.",
                ),
                io.String.Input(
                    "park", default="",
                    tooltip="Where blocks lie, as DisTorch2 writes it, such as cuda:1,8gb;cpu,*: in the memory of a "
                    "card that does not compute, then in RAM (cpu), then on the disk. gb, mb, a percentage of the "
                    "blocks, or *. Empty: in RAM; with park blocks all that is free of the devices above.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, devices: str, mode: str, park: str = "") -> io.NodeOutput:
        patcher = streamed_model(model, TITLE)
        device = patcher.engine.device
        parking = parse_parking(park) if park.strip() else None
        others = () if mode == PARK and parking is not None else cards_beside(device, devices)
        if not others and parking is None:
            logger.info("%s: there is one GPU, which makes the video alone", TITLE)
        if mode == PARK:
            if others:
                parking = ParkSpec(tuple((str(card), Amount()) for card in others))
            others = ()
        if parking is not None:
            find_parking(parking, device, host.free_vram, others)  # all of them are there
        return io.NodeOutput(patcher.with_options(others=others, parking=parking))
