"""The files that FramePack makes a video with, by their flags, and the model and encoders that they hold."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ..framepack.inputs import EncoderFiles, Encoders
from ..framepack.pipeline import FramePackFiles, FramePackPipeline
from ..runtime.progress import Progress
from ..runtime.settings import RunSettings
from .arguments import WantedFile, settings_of
from .flags import flag, is_given

REPACKAGED = "Comfy-Org/HunyuanVideo_repackaged"
TEXT_ENCODER = WantedFile(
    "text_encoder", "the LLaVA-LLaMA-3 text encoder", "llava_llama3_fp8_scaled.safetensors", REPACKAGED
)
CLIP_L = WantedFile("clip_l", "the CLIP-L text encoder", "clip_l.safetensors", REPACKAGED)
CLIP_VISION = WantedFile(
    "clip_vision",
    "the SigLIP vision model that reads pictures",
    "sigclip_vision_patch14_384.safetensors",
    "Comfy-Org/sigclip_vision_384",
)
VAE = WantedFile("vae", "the HunyuanVideo VAE", "hunyuan_video_vae_bf16.safetensors", REPACKAGED)


@dataclass(frozen=True)
class FramePackSource:
    """What a video is made with."""

    encoders: EncoderFiles
    files: FramePackFiles
    settings: RunSettings

    @classmethod
    def of(cls, options: argparse.Namespace) -> FramePackSource:
        """By flags. ValueError where a file is missing."""
        return cls(*_files(options), settings_of(options))


class OpenedFramePack:
    """The model and its encoders, opened."""

    def __init__(self, source: FramePackSource, progress: Progress) -> None:
        """CheckpointError for files that do not belong together."""
        self.pipeline = FramePackPipeline(source.files, source.settings, progress, progress.block)
        self.encoders = Encoders(source.encoders, source.settings, progress)
        self.encoders.check(self.pipeline.model.config, source.files.model)

    def release(self) -> None:
        self.pipeline.release()


def _files(options: argparse.Namespace) -> tuple[EncoderFiles, FramePackFiles]:
    name = options.model.name
    text_encoder, clip, vae = (file.required(options, name) for file in (TEXT_ENCODER, CLIP_L, VAE))
    pictured = [option for option in ("image", "end_image", "extend", "video") if is_given(options, option)]
    vision = CLIP_VISION.required(options, f"{name} with {flag(pictured[0])}") if pictured else None
    return (
        EncoderFiles(text_encoder, clip, vae, vision, options.tokenizers),
        FramePackFiles(options.model, vae, tuple(options.lora), options.model_type or "auto"),
    )
