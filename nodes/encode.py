"""Encoding a video on a small card, by the machinery that decodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .bridge import host
from .bridge.encoding import encode_images
from .inputs import tile_input, vae_input


class EncodeVideo(io.ComfyNode):
    """Frames to a Wan or FramePack latent, within the memory that there is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMEncodeVideo",
            display_name="Encode Video (Tiled, Low VRAM)",
            description="Encodes the frames of a video to its latent, in strips of rows, which are as exact, where the "
            "card is too small for whole frames. Time is never cut for Wan. As VAE Encode: sides are cropped to what "
            "the VAE takes, and frames at the end beyond 4n + 1 are left out.",
            search_aliases=["vae encode tiled", "wan vae", "encode video", "video to latent", "video to video"],
            inputs=[
                io.Image.Input("pixels", tooltip="The frames of one video."),
                vae_input(),
                tile_input(),
            ],
            outputs=[io.Latent.Output("samples")],
        )  # fmt: skip

    @classmethod
    def execute(cls, pixels: Tensor, vae: Any, tile_size: int) -> io.NodeOutput:
        return io.NodeOutput({"samples": encode_images(vae, pixels, tile_size)})
