"""What a model file is, in words and figures: kind, variant, dimensions, dtypes per part, bytes per block."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .diffusion.file_kinds import file_kind
from .framepack.checkpoint import infer_config as infer_framepack_config
from .framepack.checkpoint import plain_names, with_kernels
from .framepack.config import FramePackConfig
from .wanvideo.checkpoint import OTHER_PARTS, infer_config, official_names, variant_name
from .wanvideo.config import WanConfig
from .weights.reader import Checkpoint, CheckpointError, TensorInfo


@dataclass(frozen=True)
class PartSummary:
    """The tensors of one part of a model ("blocks", "embeddings", "head" …) stored in one dtype."""

    part: str
    dtype: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class FileIdentity:
    """What a file is. `kind` is that of `file_kind`; `block_bytes` is (least, most) or None without
    blocks; `companions` says which other files it works with.
    """

    kind: str
    title: str
    config: str
    parts: tuple[PartSummary, ...]
    num_blocks: int
    block_bytes: tuple[int, int] | None
    total_bytes: int
    companions: tuple[str, ...]


def identify(checkpoint: Checkpoint) -> FileIdentity:
    """Say what a checkpoint is from its names and shapes alone; names may be in any known layout."""
    kind = file_kind(checkpoint.tensors)
    if kind.kind == "wan transformer":
        names: dict[str, str | None] = dict(official_names(checkpoint.tensors))
        names |= {name: None for name in checkpoint.tensors if OTHER_PARTS.search(name)}
        checkpoint = checkpoint.renamed(names)
        title, config, companions = _describe_wan(checkpoint)
    elif kind.kind == "framepack transformer":
        checkpoint = with_kernels(checkpoint.renamed(plain_names(checkpoint.tensors)))
        title, config, companions = _describe_framepack(checkpoint)
    else:
        # "a Wan VAE" -> "Wan VAE": an identity is a heading, not the end of a sentence.
        title = re.sub(r"^an? ", "", kind.title)
        title, config = _describe_other(kind.kind, title, checkpoint)
        companions = COMPANIONS.get(kind.kind, ())
    block_bytes = _bytes_per_block(checkpoint.tensors.values())
    return FileIdentity(
        kind=kind.kind,
        title=title,
        config=config,
        parts=_parts(checkpoint.tensors.values()),
        num_blocks=len(block_bytes),
        block_bytes=(min(block_bytes), max(block_bytes)) if block_bytes else None,
        total_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        companions=companions,
    )


def describe(identity: FileIdentity) -> str:
    """A few lines of text for people."""
    lines = [f"{identity.title}  ({identity.kind})"]
    if identity.config:
        lines.append(f"  dimensions  {identity.config}")
    for part in identity.parts:
        lines.append(f"  {part.part:<11} {part.dtype:<14} {part.num_tensors:>5} tensors  {_size(part.num_bytes):>10}")
    if identity.block_bytes is not None:
        least, most = (_size(num) for num in identity.block_bytes)
        each = least if least == most else f"{least} to {most}"
        lines.append(f"  per block   {each}, {identity.num_blocks} blocks")
    lines.append(f"  total       {_size(identity.total_bytes)}")
    lines += [f"  needs       {companion}" for companion in identity.companions]
    return "\n".join(lines)


COMPANIONS = {"lora": ("the transformer that it was trained on",)}


# --- Wan transformers ------------------------------------------------------------------------------------

# Variants that are called by what they take.
INPUT_TITLES = {"vace": "Wan VACE", "control": "Wan Fun Control", "camera": "Wan Fun Camera"}

# (dim, layers) -> the size people know it by.
SIZES = {(1536, 30): "1.3B", (5120, 40): "14B", (3072, 30): "5B"}

UMT5 = "text encoder: UMT5-XXL (umt5_xxl_… or umt5-xxl-enc-…)"
CLIP = "image encoder: CLIP ViT-H vision (clip_vision_h or open-clip-xlm-roberta-large-vit-huge-14)"
EXPERTS = "for Wan 2.2 A14B: both experts, the high-noise and the low-noise file"


def _describe_wan(checkpoint: Checkpoint) -> tuple[str, str, tuple[str, ...]]:
    try:
        config = infer_config(checkpoint)
    except CheckpointError as error:
        variant = variant_name(checkpoint.tensors)
        reason = "not supported yet" if variant else str(error).removeprefix(f"{checkpoint.path}: ")
        return variant or "Wan transformer", reason, ()
    return _wan_title(config, checkpoint), _dimensions(config), _companions(config)


def _wan_title(config: WanConfig, checkpoint: Checkpoint) -> str:
    size = SIZES.get((config.dim, config.num_layers)) or _num_parameters(checkpoint.tensors.values())
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


def _num_parameters(tensors: Iterable[TensorInfo]) -> str:
    num = sum(math.prod(info.logical_shape or info.shape) for info in tensors)
    return f"{num / 1e9:.1f}B" if num >= 1e9 else f"{num / 1e6:.1f}M"


# --- FramePack transformers ------------------------------------------------------------------------------


def _describe_framepack(checkpoint: Checkpoint) -> tuple[str, str, tuple[str, ...]]:
    try:
        config = infer_framepack_config(checkpoint)
    except CheckpointError as error:
        return "FramePack transformer", str(error).removeprefix(f"{checkpoint.path}: "), ()
    size = _num_parameters(checkpoint.tensors.values())
    title = {
        "base": f"FramePack I2V {size} (neither its name nor its metadata says F1)",
        "f1": f"FramePack F1 I2V {size} (by its name or metadata)",
    }[config.model_type]
    return title, _framepack_dimensions(config), _framepack_companions(config)


def _framepack_dimensions(config: FramePackConfig) -> str:
    return (
        f"dim {config.dim}, mlp {config.mlp_dim}, {config.num_heads} heads x {config.head_dim}, "
        f"{config.num_layers} double and {config.num_single_layers} single blocks, "
        f"{config.in_channels} -> {config.out_channels} channels, "
        f"text {config.text_dim} and {config.pooled_dim}, image {config.image_dim}"
    )


def _framepack_companions(config: FramePackConfig) -> tuple[str, ...]:
    text = "text encoders: LLaVA-LLaMA-3 8B and CLIP-L (llava_llama3_… and clip_l)"
    if (config.text_dim, config.pooled_dim) != (4096, 768):
        text = f"text encoders: of width {config.text_dim}, and one vector of {config.pooled_dim}"
    image = "image encoder: SigLIP vision (sigclip_vision_patch14_384)"
    if config.image_dim != 1152:
        image = f"image encoder: of width {config.image_dim}"
    return text, "VAE: HunyuanVideo (hunyuan_video_vae_…)", image


# --- other files -----------------------------------------------------------------------------------------


def _describe_other(kind: str, title: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """Title and dimensions, as far as one or two shapes tell them."""
    if kind == "wan vae":
        conv = _first_shape(checkpoint, r"decoder\.(conv1|conv_in)\.weight$", 5)  # [dim, z, 3, 3, 3]
        if conv is not None:
            version = {16: "Wan 2.1", 48: "Wan 2.2"}.get(conv[1], "Wan")
            return title.replace("Wan", version), f"{conv[1]} latent channels, decoder width {conv[0]}"
    if kind == "umt5 encoder":
        table = _first_shape(checkpoint, r"(shared|token_embedding|token_embd)\.weight$", 2)
        if table is not None:
            inside = "spiece_model" in checkpoint.tensors or "tokenizer.ggml.model" in checkpoint.metadata
            tokenizer = "with its tokenizer" if inside else "needs a spiece.model"
            return title, f"width {table[1]}, {table[0]} tokens, {tokenizer}"
    if kind in ("clip vision", "siglip vision"):
        patch = _first_shape(checkpoint, r"(patch_embedding|conv1)\.weight$", 4)  # [width, 3, 14, 14]
        if patch is not None:
            return title, f"width {patch[0]}, patch {patch[2]}"
    if kind == "lora":
        down = _first_shape(checkpoint, r"\.(lora_A(\.default)?|lora_down)\.weight$", 2)
        if down is not None:
            return title, f"rank {down[0]}"
    return title, ""


def _first_shape(checkpoint: Checkpoint, pattern: str, num_dims: int) -> tuple[int, ...] | None:
    for name, info in checkpoint.tensors.items():
        shape = info.logical_shape or info.shape
        if re.search(pattern, name) and len(shape) == num_dims:
            return shape
    return None


# --- bytes -----------------------------------------------------------------------------------------------

BLOCK_PATH = re.compile(r"(?:^|.*?\.)(?:blocks?|blk|layers|resblocks|(?:single_)?transformer_blocks)\.\d+(?=\.)")


def _part(name: str) -> str:
    if BLOCK_PATH.match(name):
        return "blocks"
    if re.match(r"(head|proj_out|norm_out)\.", name):
        return "head"
    return "embeddings" if "emb" in name or name.startswith(("time_projection.", "image_projection.")) else "other"


def _parts(tensors: Iterable[TensorInfo]) -> tuple[PartSummary, ...]:
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for info in tensors:
        dtype = info.quant or str(info.dtype).removeprefix("torch.")
        groups[_part(info.name), dtype].append(info.nbytes)
    order = ("embeddings", "blocks", "head", "other")
    summaries = [PartSummary(part, dtype, len(sizes), sum(sizes)) for (part, dtype), sizes in groups.items()]
    return tuple(sorted(summaries, key=lambda part: (order.index(part.part), -part.num_bytes)))


def _bytes_per_block(tensors: Iterable[TensorInfo]) -> list[int]:
    blocks: defaultdict[str, int] = defaultdict(int)
    for info in tensors:
        if match := BLOCK_PATH.match(info.name):
            blocks[match[0]] += info.nbytes
    return list(blocks.values())


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"
