"""The pack's own tiny model as a native MODEL, CLIP and VAE: a first video with no download."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io

from ..demo.files import DEMO_FILES
from ..runtime.settings import RunSettings
from ..wanvideo.text.checkpoint import load_text_encoder
from .bridge import host
from .bridge.native_wan import make_model
from .bridge.patcher import make_patcher
from .bridge.streamed_clip import make_wan_clip
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
        engine = WanEngine(DEMO_FILES.model, RunSettings(device=host.compute_device()))
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(DEMO_FILES.vae), safe_load=True))
        clip = make_wan_clip(load_text_encoder(DEMO_FILES.text_encoder, dtype=torch.float32))
        return io.NodeOutput(make_patcher(make_model(engine)), clip, vae)
