"""For tests only: stand-ins for models whose size ComfyUI fixes (text encoders), and a look at the server's memory."""

from __future__ import annotations

import gc
from typing import Any

import comfy.clip_vision
import comfy.model_management as mm
import torch
from comfy_api.latest import ComfyExtension, io, ui


class Conditioning(io.ComfyNode):
    """Random text of a prompt's seed, as umt5-xxl would give."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestConditioning",
            inputs=[io.Int.Input("seed", default=0)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        return io.NodeOutput([[torch.randn(1, 512, 4096, generator=generator), {}]])


class ClipVision(io.ComfyNode):
    """Random tokens of a seed, as CLIP ViT-H would give for a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestClipVision",
            inputs=[io.Int.Input("seed", default=0)],
            outputs=[io.ClipVisionOutput.Output()],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        output = comfy.clip_vision.Output()
        output.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(seed))
        return io.NodeOutput(output)


class Loaded(io.ComfyNode):
    """What is loaded now: "models; bytes"."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestLoaded",
            is_output_node=True,
            inputs=[io.Int.Input("nonce", default=0), io.AnyType.Input("after", optional=True)],
            outputs=[],
        )

    @classmethod
    def execute(cls, nonce: int, after: Any = None) -> io.NodeOutput:
        gc.collect()
        loaded = sum(model.loaded_size() for model in mm.loaded_models())
        return io.NodeOutput(ui=ui.PreviewText(f"{len(mm.loaded_models())}; {loaded}"))


class StandIns(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        return [Conditioning, ClipVision, Loaded]


async def comfy_entrypoint() -> StandIns:
    return StandIns()
