"""The node that says what a model would use."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..memory.plan.table import describe
from .bridge import host
from .bridge.patcher import StreamedModelPatcher
from .inputs import ADVANCED, check_numbers, model_input, streamed_model

CARD_GB = 8.0  # whose plan is shown where there is no GPU and none was named


class VramPlan(io.ComfyNode):
    """Shows, before anything runs, what a video of a size would take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMPlan",
            display_name="VRAM Plan",
            description="Shows what a video of this size would take and why, before anything runs. What does not fit "
            "is answered with what would.",
            search_aliases=["vram calculator", "vram estimate", "memory estimate", "out of memory", "how much vram"],
            is_output_node=True,
            inputs=[
                model_input(", with Block Swap where you use it"),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Of the video, in pixels."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Of the video, in pixels."),
                io.Int.Input(
                    "length", default=81, min=1, max=8192, step=4,
                    tooltip="Frames: 4n + 1. Of no matter with FramePack: a section is planned.",
                ),
                io.Boolean.Input(
                    "guidance", default=True,
                    tooltip="On for a CFG above 1: the model then runs twice per step. Off for distilled models "
                    "and LoRAs at CFG 1.",
                ),
                io.Float.Input(
                    "card_gb", default=0.0, min=0.0, max=192.0, step=1.0,
                    tooltip="0: this machine as it is now. N: a card of N GB, half a GiB of it left to the desktop.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, unchanged."), io.String.Output("plan")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, width: int, height: int, length: int, guidance: bool, card_gb: float) -> io.NodeOutput:
        patcher = streamed_model(model, "VRAM Plan")
        check_numbers(card_gb=card_gb)
        text = plan_text(patcher, (width, height, length), 2 if guidance else 1, card_gb)
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))


def plan_text(patcher: StreamedModelPatcher, size: tuple[int, int, int], passes: int, card_gb: float) -> str:
    """The plan for a video of `size` (width, height, frames) as text, or why there is none and what would fit."""
    engine = patcher.engine
    width, height, frames = size
    work = engine.video_work(width, height, frames, passes)
    note = f"{engine.plan_note}\n" if engine.plan_note else ""
    if not card_gb and engine.device.type != "cuda":
        note += f"ComfyUI runs on the CPU: this is the plan for a card of {CARD_GB:g} GB.\n"
        card_gb = CARD_GB
    try:
        told = describe(engine.preview(work, patcher.options, card_gb))
    except ValueError as refusal:
        told = str(refusal)
    return f"{told}\n\n{note}".rstrip()
