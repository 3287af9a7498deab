"""Nodes that say how a model may use memory, what it would use, and what it used."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..memory.plan.table import describe
from .bridge import host
from .bridge.engine import Engine
from .bridge.patcher import StreamedModelPatcher

GIB = 2**30
LOADERS = "Load Wan Video Model or Load FramePack Model (Low VRAM)"
CARD_GB = 8.0  # whose plan is shown where there is no GPU and none was named


def streamed_model(model: Any, node: str) -> StreamedModelPatcher:
    """The MODEL as ours; ValueError for one of ComfyUI's own loaders."""
    if isinstance(model, StreamedModelPatcher):
        return model
    raise ValueError(
        f"{node} works on models of {LOADERS}; this one comes from another loader, whose weights ComfyUI streams by "
        "itself: load the file with one of those, or take this one out"
    )


class BlockSwap(io.ComfyNode):
    """How much memory a streamed model may use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMBlockSwap",
            display_name="Block Swap (Low VRAM)",
            description="Sets how many blocks of the model stream from RAM (or disk) and how much memory it may use. "
            "Without this node everything is planned from what is free.",
            search_aliases=["block swap", "vram budget", "offload", "blocks to swap"],
            inputs=[
                io.Model.Input("model", tooltip=f"A MODEL of {LOADERS}."),
                io.Int.Input(
                    "blocks_to_swap",
                    default=-1,
                    min=-1,
                    max=100,
                    tooltip="-1: planned, so that it fits and runs as fast as it can. 0: all blocks stay in VRAM. "
                    "N: exactly N blocks are streamed in every pass.",
                ),
                io.Float.Input(
                    "vram_budget_gb",
                    default=0.0,
                    min=0.0,
                    max=192.0,
                    step=0.25,
                    tooltip="A hard limit in GiB for all of ComfyUI while this model runs. 0: what is free, less "
                    "what --reserve-vram leaves to others.",
                ),
                io.Int.Input(
                    "prefetch",
                    default=0,
                    min=0,
                    max=40,
                    tooltip="So many blocks arrive ahead of the one that computes. 0: planned; 1 is enough where "
                    "transfers are as fast as compute.",
                    extra_dict={"advanced": True},
                ),
                io.Float.Input(
                    "ram_budget_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="RAM for this model's weights in GiB; below their size they stream from the disk. 0: what "
                    "is free.",
                    extra_dict={"advanced": True},
                ),
                io.Boolean.Input(
                    "pinned_memory",
                    default=True,
                    tooltip="Pinned RAM copies to the GPU at full speed while it computes. Turn it off if pinning "
                    "fails or the system stutters; --disable-pinned-memory does the same for all of ComfyUI.",
                    extra_dict={"advanced": True},
                ),
                io.Boolean.Input(
                    "pass_other_models",
                    default=False,
                    tooltip="On: a model of another loader passes through as it is. Off: it is an error that says why.",
                    extra_dict={"advanced": True},
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, pass_other_models: bool = False, **options: Any) -> io.NodeOutput:
        if pass_other_models and not isinstance(model, StreamedModelPatcher):
            return io.NodeOutput(model)
        patcher = streamed_model(model, "Block Swap (Low VRAM)")
        num_blocks = len(patcher.engine.streamed.blocks)
        if options["blocks_to_swap"] > num_blocks:
            raise ValueError(
                f"blocks_to_swap is {options['blocks_to_swap']}, but this model has {num_blocks} blocks: "
                f"use -1 (planned) or 0 to {num_blocks}"
            )
        return io.NodeOutput(patcher.with_options(**options))


class VramPlan(io.ComfyNode):
    """Shows, before anything runs, what a video of a size would take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMPlan",
            display_name="VRAM Plan",
            description="Shows what a video of this size would take and why, before anything runs. What does not fit "
            "is answered with what would.",
            search_aliases=["vram plan", "vram estimate", "memory estimate"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=f"A MODEL of {LOADERS}, with Block Swap where you use it."),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Of the video, in pixels."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Of the video, in pixels."),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=8192,
                    step=4,
                    tooltip="Frames: 4n + 1. Of no matter with FramePack: a section is planned.",
                ),
                io.Boolean.Input(
                    "guidance",
                    default=True,
                    tooltip="On for a CFG above 1: the model then runs twice per step. Off for distilled models "
                    "and LoRAs at CFG 1.",
                ),
                io.Float.Input(
                    "card_gb",
                    default=0.0,
                    min=0.0,
                    max=192.0,
                    step=1.0,
                    tooltip="0: this machine as it is now. N: a card of N GB, half a GiB of it left to the desktop.",
                    extra_dict={"advanced": True},
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, unchanged."), io.String.Output("plan")],
        )

    @classmethod
    def execute(cls, model: Any, width: int, height: int, length: int, guidance: bool, card_gb: float) -> io.NodeOutput:
        patcher = streamed_model(model, "VRAM Plan")
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
        return note + describe(engine.preview(work, patcher.options, card_gb))
    except ValueError as refusal:
        return f"{note}{refusal}"


class MemoryReport(io.ComfyNode):
    """Shows what the last run of a model used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMMemoryReport",
            display_name="Memory Report",
            description="Shows what the last run of this model used: peaks beside their prediction, transfers, and a "
            "timeline. Connect the sampler's latent, so that it comes after the run.",
            search_aliases=["memory report", "vram usage", "timeline"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=f"The MODEL of {LOADERS} that the sampler used."),
                io.AnyType.Input("after", optional=True, tooltip="What to wait for: the sampler's LATENT."),
            ],
            outputs=[io.String.Output("report"), io.Image.Output("timeline")],
        )

    @classmethod
    def execute(cls, model: Any, after: Any = None) -> io.NodeOutput:
        engine = streamed_model(model, "Memory Report").engine
        if engine.report is None:
            text = "This model has not run yet: connect the sampler's LATENT to `after`."
            return io.NodeOutput(text, torch.zeros(1, 8, 8, 3), ui=ui.PreviewText(text))
        text = engine.report.table()
        if engine.streamed.plan is not None and engine.device.type == "cuda":
            text += "\n\n" + describe(engine.streamed.plan)
        try:
            picture = _timeline(engine)
        except ImportError as error:
            text += f"\n\nNo timeline: {error} (pip install matplotlib)"
            return io.NodeOutput(text, torch.zeros(1, 8, 8, 3), ui=ui.PreviewText(text))
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(text, picture, ui=shown)


def _timeline(engine: Engine[Any]) -> Tensor:
    """The run as an IMAGE `[1, H, W, 3]`."""
    from ..memory.report.timeline import draw_timeline  # matplotlib: a report without a picture is better than none

    assert engine.report is not None
    with Image.open(BytesIO(draw_timeline(engine.report))) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]
