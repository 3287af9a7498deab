"""Whether the files of one model belong together."""

from __future__ import annotations

from collections.abc import Sequence

from ..weights.files.checkpoint import CheckpointError
from .clip_vision import FILE_NAME as CLIP_FILE
from .clip_vision import ClipVisionEncoder
from .identity import WanFiles
from .network.config import WanConfig
from .text.checkpoint import open_text_encoder
from .vae.model import VAEConfig


def check_experts_given(files: WanFiles) -> None:
    """ValueError where there is something for a low-noise expert that is not given."""
    if files.loras_low and not files.model_low:
        raise ValueError(
            f"{files.loras_low[0].path}: a LoRA for the low-noise expert, but there is only {files.model.name}: "
            "give it as the model's LoRA, or give the low-noise model too"
        )
    if files.vace_module_low and not files.model_low:
        raise ValueError(
            f"{files.vace_module_low}: a VACE module for the low-noise expert, but there is only "
            f"{files.model.name}: give it as the model's VACE module, or give the low-noise model too"
        )


def check_files_match(
    files: WanFiles, experts: Sequence[WanConfig], vae: VAEConfig, clip_vision: ClipVisionEncoder | None
) -> None:
    """CheckpointError where the VAE or an encoder is of another model than the first of `experts`, or that of the next.

    It says what the file is, what was expected, and what to choose.
    """
    config = experts[0]
    _check_vae(files, config, vae)
    _check_encoders(files, config, clip_vision)
    if any(other != config for other in experts[1:]):
        raise CheckpointError(
            f"{files.model_low}: its dimensions differ from those of {files.model.name}: "
            "give the high- and the low-noise expert of one model"
        )


def _check_vae(files: WanFiles, config: WanConfig, vae: VAEConfig) -> None:
    if config.out_channels != vae.z_dim:
        raise CheckpointError(
            f"{files.vae}: this VAE has {vae.z_dim} latent channels but {files.model.name} makes "
            f"{config.out_channels}: use wan_2.1_vae.safetensors for Wan 2.1 and 2.2 A14B, "
            "wan2.2_vae.safetensors for TI2V 5B"
        )
    if vae.decoded_channels != 3:
        raise CheckpointError(
            f"{files.vae}: this VAE decodes {vae.decoded_channels} channels of a pixel, which nodes of "
            f"ComfyUI can use; expected the 3 of a video; use {vae.file_name}"
        )


def _check_encoders(files: WanFiles, config: WanConfig, clip_vision: ClipVisionEncoder | None) -> None:
    if clip_vision is not None and clip_vision.config.dim != config.image_dim:
        wanted = f"reads features of width {config.image_dim}" if config.image_dim else "reads no CLIP features"
        raise CheckpointError(
            f"{files.clip_vision}: makes features of width {clip_vision.config.dim} but {files.model.name} "
            f"{wanted}: leave it out, or choose {CLIP_FILE} for Wan 2.1 image-to-video models"
        )
    text_file = open_text_encoder(files.text_encoder)
    text_file.tokenizer(config.text_tokens)  # its lack would only show after the start
    text_dim = text_file.config.dim
    if text_dim != config.text_dim:
        raise CheckpointError(
            f"{files.text_encoder}: makes text of width {text_dim} but {files.model.name} takes "
            f"{config.text_dim}: choose the text encoder that belongs to the model (umt5-xxl: 4096)"
        )
