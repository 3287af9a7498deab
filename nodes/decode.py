"""Decoding a video on a small card: in tiles, frame by frame, with the frames in RAM."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..system.atomic_files import write_file
from .bridge import host
from .bridge.decoding import decode_video
from .inputs import ADVANCED, keep_latent_input, latent_input, tile_input, vae_input

logger = logging.getLogger(__name__)


class DecodeVideo(io.ComfyNode):
    """A Wan latent to frames, within the memory that there is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMDecodeVideo",
            display_name="Decode Video (Tiled, Low VRAM)",
            description="Decodes a Wan video frame by frame, or in strips of rows, which are as exact, where the card "
            "is too small for whole frames. Wan's time is never cut, so there are no pulses; frames move to RAM as "
            "they are made.",
            search_aliases=["vae decode tiled", "wan vae", "decode video", "out of memory", "taehv", "lightvae"],
            inputs=[
                latent_input(),
                vae_input(),
                tile_input(),
                io.Int.Input(
                    "temporal_chunk", default=0, min=0, max=4096, step=4,
                    tooltip="Whole frames that gather on the GPU before they move to RAM. 0: each as soon as it is "
                    "made, which needs the least memory.", extra_dict=ADVANCED,
                ),
                keep_latent_input(),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, samples: dict[str, Any], vae: Any, tile_size: int, temporal_chunk: int, keep_latent: bool
    ) -> io.NodeOutput:
        latent: Tensor = samples["samples"]
        if keep_latent:
            save_latent(latent)
        return io.NodeOutput(decode_video(vae, latent, tile_size, temporal_chunk))


def save_latent(latent: Tensor) -> None:
    """Write the latent as ComfyUI's Save Latent does; where that fails, decoding is all the more wanted."""
    tensors = {"latent_tensor": latent.contiguous().cpu(), "latent_format_version_0": torch.tensor([])}
    try:
        path = host.output_path("latents/LowVRAM", ".latent")
        write_file(path, save(tensors))
    except (OSError, SafetensorError) as error:
        logger.warning("the latent is not kept, as it cannot be written (%s): decoding goes on", error)
    else:
        logger.info("the latent is kept in %s", path)
