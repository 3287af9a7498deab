"""Wan's text encoder from a file that stays on the disk, as a native CLIP."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..wanvideo.text.checkpoint import load_text_encoder
from .bridge import host
from .bridge.streamed_clip import make_wan_clip

DEVICES = ("default", "cpu")


class LoadClipGGUF(io.ComfyNode):
    """A umt5-xxl whose blocks are read from the file when CLIP Text Encode runs them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMLoadClipGGUF",
            display_name="CLIP Loader (Low VRAM)",
            description="Loads Wan's text encoder (umt5-xxl) from a safetensors or GGUF file as an ordinary CLIP. Its "
            "weights stay on the disk: while a prompt is encoded about two of its tensors are in RAM, as they are "
            "stored.",
            search_aliases=[
                "clip gguf", "gguf", "umt5", "text encoder", "load clip", "clip loader gguf", "t5 gguf",
                "out of memory", "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "clip_name", options=host.model_files(host.TEXT_FOLDER),
                    tooltip="A umt5-xxl encoder as .safetensors (fp16, bf16, fp8) or .gguf in models/text_encoders or "
                    "models/clip. It is read afresh for every new prompt, so a fast disk helps.",
                ),
                io.Combo.Input(
                    "device", options=list(DEVICES), default="default",
                    tooltip="Where prompts are encoded. default: where ComfyUI puts text encoders, which is the GPU "
                    "where it fits. cpu: slower, and takes no VRAM.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, device: str) -> str:
        return f"{host.model_stamp(clip_name, host.TEXT_FOLDER)} {device}"

    @classmethod
    def execute(cls, clip_name: str, device: str) -> io.NodeOutput:
        place = torch.device("cpu") if device == "cpu" else host.text_encoder_device()
        # in fp32, as core's own
        encoder = load_text_encoder(host.model_path(clip_name, host.TEXT_FOLDER), device=place, dtype=torch.float32)
        return io.NodeOutput(make_wan_clip(encoder))
