"""The pack's own tiny model as a native MODEL, CLIP and VAE: a first video with no download."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io

from ..demo.files import DEMO_FILES
from ..runtime.settings import RunSettings
from ..wanvideo.text.checkpoint import load_text_encoder
from ..wanvideo.text.encoder import TextEncoder
from .bridge import host
from .bridge.native_wan import make_model
from .bridge.patcher import StreamedModelPatcher
from .bridge.wan_engine import WanEngine


class LoadDemo(io.ComfyNode):
    """The demo model, which lies in the pack's folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadDemo",
            display_name="Load Demo Model (Low VRAM)",
            description="Loads the tiny model that comes with this pack. It draws a ball, square or triangle that "
            "moves, 96x96 pixels, in seconds on any machine: a check that everything works before you download.",
            search_aliases=["demo", "tiny model", "test model", "low vram"],
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        device = host.compute_device()
        engine = WanEngine(DEMO_FILES.model, RunSettings(device=device))
        model = StreamedModelPatcher(make_model(engine), device, host.offload_device(), engine.total_bytes)
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(DEMO_FILES.vae), safe_load=True))
        return io.NodeOutput(model, DemoClip(load_text_encoder(DEMO_FILES.text_encoder, dtype=torch.float32)), vae)


class DemoClip:
    """What CLIP Text Encode asks of a CLIP, for a text encoder of a size that ComfyUI does not know.

    It stays on the CPU: the encoder is 1 MB.
    """

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def tokenize(self, text: str, **_: Any) -> str:
        """The text itself: the encoder has its own tokenizer."""
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> list[list[Any]]:
        """CONDITIONING of `[1, 512, dim]`."""
        return [[self.encoder.encode([tokens]), {"pooled_output": None}]]
