"""Text encoders from GGUF files, as a native CLIP."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..wanvideo.text_checkpoint import dense_weights
from . import host

DEVICES = ("default", "cpu")


class LoadClipGGUF(io.ComfyNode):
    """A umt5-xxl GGUF unpacked to fp16, for CLIP Text Encode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadClipGGUF",
            display_name="CLIP Loader (GGUF, Low VRAM)",
            description="Loads Wan's text encoder (umt5-xxl) from a GGUF file as an ordinary CLIP. The file is small "
            "on the disk; in RAM its weights are unpacked to fp16.",
            search_aliases=["clip gguf", "gguf", "umt5", "text encoder", "load clip", "low vram"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=host.model_files(host.TEXT_FOLDER, (".gguf",)),
                    tooltip="A umt5-xxl encoder as .gguf in models/text_encoders or models/clip. Unpacked it takes "
                    "12 GB of RAM, and 23 GB for a moment while it loads where ComfyUI runs without its dynamic VRAM; "
                    "with less, use the fp8 file (6.7 GB) in ComfyUI's Load CLIP.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default="default",
                    tooltip="Where prompts are encoded. default: where ComfyUI puts text encoders, which is the GPU "
                    "where it fits. cpu: slower, and takes no VRAM.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, device: str) -> str:
        return f"{host.model_stamp(clip_name, host.TEXT_FOLDER)} {device}"

    @classmethod
    def execute(cls, clip_name: str, device: str) -> io.NodeOutput:
        config, weights = dense_weights(host.model_path(clip_name, host.TEXT_FOLDER), torch.float16)
        sizes = {
            "vocab_size": config.vocab_size,
            "d_model": config.dim,
            "d_kv": config.attention_dim // config.num_heads,
            "d_ff": config.ffn_dim,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
        }
        return io.NodeOutput(host.make_wan_clip(weights, torch.device("cpu") if device == "cpu" else None, **sizes))
