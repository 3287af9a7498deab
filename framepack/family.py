"""FramePack's entry in the table of families."""

from __future__ import annotations

from ..runtime.family import Description, Family, num_parameters
from ..weights.files.checkpoint import Checkpoint, CheckpointError
from .checkpoint import WANTED, check_file, infer_config, open_framepack, with_plain_names
from .network.config import FramePackConfig
from .streamed import StreamedFramePack


def describe(checkpoint: Checkpoint) -> Description:
    """See `Family`."""
    try:
        config = infer_config(checkpoint)
    except CheckpointError as error:
        return Description("FramePack transformer", str(error).removeprefix(f"{checkpoint.path}: "))
    size = num_parameters(checkpoint.tensors.values())
    title = {
        "base": f"FramePack I2V {size} (neither its name nor its metadata says F1)",
        "f1": f"FramePack F1 I2V {size} (by its name or metadata)",
    }[config.model_type]
    return Description(title, _dimensions(config), _companions(config))


def _dimensions(config: FramePackConfig) -> str:
    return (
        f"dim {config.dim}, mlp {config.mlp_dim}, {config.num_heads} heads x {config.head_dim}, "
        f"{config.num_layers} double and {config.num_single_layers} single blocks, "
        f"{config.in_channels} -> {config.out_channels} channels, "
        f"text {config.text_dim} and {config.pooled_dim}, image {config.image_dim}"
    )


def _companions(config: FramePackConfig) -> tuple[str, ...]:
    text = "text encoders: LLaVA-LLaMA-3 8B and CLIP-L (llava_llama3_… and clip_l)"
    if (config.text_dim, config.pooled_dim) != (4096, 768):
        text = f"text encoders: of width {config.text_dim}, and one vector of {config.pooled_dim}"
    image = "image encoder: SigLIP vision (sigclip_vision_patch14_384)"
    if config.image_dim != 1152:
        image = f"image encoder: of width {config.image_dim}"
    return text, "VAE: HunyuanVideo (hunyuan_video_vae_…)", image


FRAMEPACK = Family(
    "FramePack",
    WANTED,
    lambda path: open_framepack(path)[1],
    StreamedFramePack,
    with_plain_names,
    describe,
    check_file,
)
