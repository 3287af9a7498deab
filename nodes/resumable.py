"""The node that keeps the steps of ComfyUI's samplers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .bridge import host
from .bridge.framepack_engine import FramePackEngine
from .bridge.resumable import make_resumable
from .inputs import streamed_model

NAME = "Resumable Sampling (Low VRAM)"


class ResumableSampling(io.ComfyNode):
    """A MODEL whose sampling goes on where it was stopped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMResumableSampling",
            display_name=NAME,
            description="Keeps every step of KSampler, KSampler (Advanced) and SamplerCustomAdvanced on the disk. "
            "Cancel pauses: all VRAM is given back, and the same workflow goes on from the last whole step when it is "
            "queued again, also after a crash or a restart, to the same video bit for bit.",
            search_aliases=["resume", "pause", "checkpoint sampling", "crash", "continue", "low vram"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A MODEL of Load Wan Video Model (Low VRAM); of Wan 2.2's two experts, each takes a node "
                    "of its own.",
                )
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        patcher = streamed_model(model, NAME)
        if isinstance(patcher.engine, FramePackEngine):
            raise ValueError(f"FramePack Sampler (Low VRAM) keeps its sections by itself: take {NAME} out")
        return io.NodeOutput(make_resumable(patcher))
