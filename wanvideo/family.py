"""Wan's entry in the table of families."""

from __future__ import annotations

from ..runtime.family import Description, Family, num_parameters
from ..weights.files.checkpoint import Checkpoint, CheckpointError
from .checkpoint import WANTED, check_file, infer_config, open_wan, variant_name, with_official_names
from .network.config import WanConfig
from .streamed import StreamedWan

# Variants that are called by what they take.
INPUT_TITLES = {"vace": "Wan VACE", "control": "Wan Fun Control", "camera": "Wan Fun Camera"}

# (dim, layers) -> the size people know it by.
SIZES = {(1536, 30): "1.3B", (5120, 40): "14B", (3072, 30): "5B"}

UMT5 = "text encoder: UMT5-XXL (umt5_xxl_… or umt5-xxl-enc-…)"
CLIP = "image encoder: CLIP ViT-H vision (clip_vision_h or open-clip-xlm-roberta-large-vit-huge-14)"
EXPERTS = "for Wan 2.2 A14B: both experts, the high-noise and the low-noise file"


def describe(checkpoint: Checkpoint) -> Description:
    """See `Family`; variants that are not supported are named."""
    try:
        config = infer_config(checkpoint)
    except CheckpointError as error:
        variant = variant_name(checkpoint.tensors)
        reason = "not supported yet" if variant else str(error).removeprefix(f"{checkpoint.path}: ")
        return Description(variant or "Wan transformer", reason)
    return Description(_title(config, checkpoint), _dimensions(config), _companions(config))


def _title(config: WanConfig, checkpoint: Checkpoint) -> str:
    size = SIZES.get((config.dim, config.num_layers)) or num_parameters(checkpoint.tensors.values())
    if config.model_type in INPUT_TITLES:
        return f"{INPUT_TITLES[config.model_type]} {size}"
    if config.model_type == "ti2v":
        return f"Wan 2.2 TI2V {size}"
    if config.model_type == "flf2v":
        return f"Wan 2.1 FLF2V {size}"
    if config.model_type == "i2v":
        if config.image_dim:
            return f"Wan 2.1 I2V {size}"
        return "Wan 2.2 I2V A14B, one of two experts" if size == "14B" else f"Wan 2.2 I2V {size}"
    # Wan 2.2's two text-to-video experts have the names and shapes of 2.1's model.
    return f"Wan 2.1 T2V {size}" + (" or Wan 2.2 T2V A14B, one of two experts" if size == "14B" else "")


def _dimensions(config: WanConfig) -> str:
    text = (
        f"dim {config.dim}, ffn {config.ffn_dim}, {config.num_heads} heads x {config.head_dim}, "
        f"{config.num_layers} blocks, {config.in_channels} -> {config.out_channels} channels, text {config.text_dim}"
    )
    if config.image_dim:
        text += f", image {config.image_dim}"
    return text + (f" with {config.image_pos_tokens} positions" if config.image_pos_tokens else "")


def _companions(config: WanConfig) -> tuple[str, ...]:
    text = UMT5 if config.text_dim == 4096 else f"text encoder: UMT5 architecture of width {config.text_dim}"
    version = {16: "Wan 2.1 VAE (wan_2.1_vae)", 48: "Wan 2.2 VAE (wan2.2_vae)"}.get(config.out_channels)
    companions = [text, f"VAE: {version or f'one of {config.out_channels} latent channels'}"]
    if config.image_dim:
        companions.append(CLIP)
    elif config.dim == 5120:
        companions.append(EXPERTS)
    return tuple(companions)


WAN = Family("Wan", WANTED, lambda path: open_wan(path)[1], StreamedWan, with_official_names, describe, check_file)
