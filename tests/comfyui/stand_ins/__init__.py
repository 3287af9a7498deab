"""For tests only: stand-ins for models whose size ComfyUI fixes (text encoders), and a look at the server's memory."""

from __future__ import annotations

import gc
import zlib
from typing import Any

import comfy.clip_vision
import comfy.model_management as mm
import torch
from comfy_api.latest import ComfyExtension, io, ui

from .kills import KillAt
from .vae import LoadTinyVAE


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


class TextEncoder:
    """Random text of a prompt's own: umt5-xxl's, of fewer tokens than its 512, or with `pooled` HunyuanVideo's."""

    def __init__(self, pooled: bool):
        self._pooled = pooled

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        if not self._pooled:
            return [[torch.randn(1, 48, 4096, generator=generator), {}]]
        tokens = torch.randn(1, 12 + len(text) % 8, 4096, generator=generator)
        return [[tokens, {"pooled_output": torch.randn(1, 768, generator=generator)}]]


class LoadTextEncoder(io.ComfyNode):
    """In place of CLIPLoader and DualCLIPLoader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestTextEncoder",
            inputs=[io.Boolean.Input("pooled", default=False)],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, pooled: bool) -> io.NodeOutput:
        return io.NodeOutput(TextEncoder(pooled))


class ImageEncoder:
    """Random tokens of a picture's own: CLIP ViT-H's, and SigLIP's as its last hidden state."""

    def encode_image(self, image: torch.Tensor, crop: bool) -> comfy.clip_vision.Output:
        generator = torch.Generator().manual_seed(zlib.crc32(image.numpy().tobytes()))
        output = comfy.clip_vision.Output()
        output.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=generator)
        output.last_hidden_state = torch.randn(1, 729, 1152, generator=generator)
        return output


class LoadImageEncoder(io.ComfyNode):
    """In place of CLIPVisionLoader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestImageEncoder", inputs=[], outputs=[io.ClipVision.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(ImageEncoder())


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
        return [Conditioning, LoadTextEncoder, LoadImageEncoder, LoadTinyVAE, Loaded, KillAt]


async def comfy_entrypoint() -> StandIns:
    gc.collect()
    gc.freeze()  # what the server has imported: TestLoaded need not look through it
    return StandIns()
