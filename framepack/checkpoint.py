"""FramePack transformer files: dimensions from names and shapes, base or F1, loading without a second copy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..system.plain_text import shown
from ..weights.files.checkpoint import Checkpoint, CheckpointError
from ..weights.files.dimensions import Dimensions, model_prefix, stated_number, with_kernels
from ..weights.files.kinds import WantedKind, check_kind
from ..weights.files.open import open_checkpoint
from ..weights.linear.adopt import adopt_tensors
from ..weights.linear.dialects import HEADER_KEY, plain_dialect, with_plain_parts
from ..weights.linear.fitting import fit_tensors
from .network.config import FramePackConfig
from .network.model import FramePackModel

MODEL_TYPES = ("base", "f1")
MODEL_TYPE_KEY = "lowvram_video.model_type"  # header metadata: base or f1
ROPE_AXES_KEY = "lowvram_video.rope_axes"  # header metadata, for models whose heads are not 128 wide: "4,6,6"
ROPE_AXES = {128: (16, 56, 56)}

TITLE = "a FramePack transformer"
WANTED = WantedKind(
    "framepack transformer",
    TITLE,
    "a FramePack or FramePack F1 transformer",
    "FramePackI2V_HY_… or FramePack_F1_I2V_HY_…",
    ("hunyuan vae", "siglip vision"),
)
# The first parts of its names.
ROOTS = (
    "x_embedder.",
    "clean_x_embedder.",
    "context_embedder.",
    "image_projection.",
    "time_text_embed.",
    "transformer_blocks.",
    "single_transformer_blocks.",
    "norm_out.",
    "proj_out.",
)


def build_framepack(config: FramePackConfig, checkpoint: Checkpoint) -> FramePackModel:
    """The model on the meta device, every tensor of the dtype that the file stores. Raises CheckpointError."""
    model = FramePackModel(config, device="meta")
    return adopt_tensors(model, checkpoint, "this FramePack transformer", WANTED.expected)


def open_framepack(path: str | Path, model_type: str = "auto") -> tuple[FramePackConfig, Checkpoint]:
    """Open a FramePack transformer in any known layout; its tensors get diffusers' names.

    `path` is a file, an index, a shard or a folder (`open_checkpoint`). `model_type` is "base" or "f1", or "auto": by
    the file's metadata or name (`told_model_type`); the checkpoint's metadata then say it. Raises ValueError for an
    unknown `model_type`, and CheckpointError, which says what the file is when it is another kind of model.
    """
    if model_type not in ("auto", *MODEL_TYPES):
        raise ValueError(f"model_type is {model_type!r}; expected one of auto, {', '.join(MODEL_TYPES)}")
    return framepack_of(open_checkpoint(path), model_type)


def framepack_of(checkpoint: Checkpoint, model_type: str = "auto") -> tuple[FramePackConfig, Checkpoint]:
    """`open_framepack` of an opened file."""
    check_kind(checkpoint, WANTED)
    checkpoint = with_plain_parts(checkpoint)
    names = plain_names(checkpoint.tensors)
    checkpoint = with_kernels(plain_dialect(checkpoint.renamed(names), names), KERNELS)
    told = told_model_type(checkpoint) if model_type == "auto" else model_type
    checkpoint = replace(checkpoint, metadata={**checkpoint.metadata, MODEL_TYPE_KEY: told})
    config = infer_config(checkpoint)
    return config, fit_tensors(FramePackModel(config, device="meta"), checkpoint)


def check_file(checkpoint: Checkpoint) -> FramePackModel:
    """All that loading asks of an opened file but its bytes; CheckpointError where it cannot be loaded."""
    return build_framepack(*framepack_of(checkpoint))


def with_plain_names(checkpoint: Checkpoint) -> Checkpoint:
    """Its tensors by diffusers' names, as they are stored, with the shapes that the model has."""
    return with_kernels(checkpoint.renamed(plain_names(checkpoint.tensors)), KERNELS)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """`{name in the file: diffusers' name}`, from any known prefix; names that fit nothing stay."""
    names = list(names)
    prefix = model_prefix(names, ROOTS) or ""
    return {name: name.removeprefix(prefix) for name in names}


# The convolutions to tokens: their kernels.
KERNELS = {
    "x_embedder.proj": (1, 2, 2),
    "clean_x_embedder.proj": (1, 2, 2),
    "clean_x_embedder.proj_2x": (2, 4, 4),
    "clean_x_embedder.proj_4x": (4, 8, 8),
}


# --- base or F1 ------------------------------------------------------------------------------------------

# F1 as a word or after the model's name: FramePack_F1_I2V_HY_20250503, FramePackF1I2V; but not bf16, nor in a hash.
F1 = re.compile(r"((?<![a-z0-9])|(?<=framepack))f1(?=i2v|[^a-z0-9]|$)", re.IGNORECASE)
MODEL_NAME = re.compile(r"frame[ _-]?pack", re.IGNORECASE)
NUM_FOLDERS = 3  # as far up as the Hugging Face cache names a model: models--…/snapshots/hash/file


def told_model_type(checkpoint: Checkpoint) -> str:
    """Which of MODEL_TYPES: F1 where metadata or the name say so, as the two have the same tensors.

    Raises CheckpointError for metadata that make no sense.
    A file that is not called after the model (a shard, `model.safetensors`) goes by the nearest folder that is.
    """
    stated = checkpoint.metadata.get(MODEL_TYPE_KEY)
    if stated is not None and stated not in MODEL_TYPES:
        raise CheckpointError(
            f"{checkpoint.path}: header metadata {MODEL_TYPE_KEY} = {shown(stated)}; expected "
            f"{' or '.join(MODEL_TYPES)}; correct that key in the file's metadata, or choose the model type yourself"
        )
    if stated is not None:
        return stated
    if any(F1.search(value) for key, value in checkpoint.metadata.items() if key != HEADER_KEY):
        return "f1"
    name, folders = checkpoint.path.name, [folder.name for folder in checkpoint.path.absolute().parents[:NUM_FOLDERS]]
    told_by = next((part for part in (name, *folders) if MODEL_NAME.search(part)), "")
    return "f1" if F1.search(told_by) or F1.search(name) else "base"


# --- dimensions ------------------------------------------------------------------------------------------


def infer_config(checkpoint: Checkpoint) -> FramePackConfig:
    """The dimensions of a FramePack transformer from diffusers' names, shapes and metadata. Raises CheckpointError."""
    sizes = Dimensions(checkpoint, TITLE)
    dim, in_channels, *patch = sizes.shape("x_embedder.proj.weight", 5)
    head_dim = sizes.shape("transformer_blocks.0.attn.norm_q.weight", 1)[0]
    if not head_dim or dim % head_dim:
        raise CheckpointError(
            f"{checkpoint.path}: x_embedder.proj.weight makes tokens of {dim}, transformer_blocks.0.attn.norm_q.weight "
            f"heads of {head_dim}; expected a multiple; the file mixes two models: download it again"
        )
    return FramePackConfig(
        num_heads=dim // head_dim,
        head_dim=head_dim,
        num_layers=sizes.num_blocks("transformer_blocks"),
        num_single_layers=sizes.num_blocks("single_transformer_blocks"),
        num_refiner_layers=sizes.num_blocks("context_embedder.token_refiner.refiner_blocks"),
        in_channels=in_channels,
        out_channels=sizes.parts("proj_out.weight", 2, math.prod(patch)),
        text_dim=sizes.shape("context_embedder.proj_in.weight", 2)[1],
        pooled_dim=sizes.shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        image_dim=sizes.shape("image_projection.up.weight", 2)[1],
        mlp_ratio=sizes.shape("transformer_blocks.0.ff.net.0.proj.weight", 2)[0] / dim,
        patch_size=(patch[0], patch[1], patch[2]),
        rope_axes=_rope_axes(checkpoint, head_dim),
        freq_dim=sizes.shape("time_text_embed.timestep_embedder.linear_1.weight", 2)[1],
        model_type=told_model_type(checkpoint),
    )


def _rope_axes(checkpoint: Checkpoint, head_dim: int) -> tuple[int, int, int]:
    stated = checkpoint.metadata.get(ROPE_AXES_KEY)
    if stated is None and head_dim in ROPE_AXES:
        return ROPE_AXES[head_dim]
    axes = [stated_number(part) or 0 for part in (stated or "").split(",")]
    if len(axes) == 3 and sum(axes) == head_dim and all(axis > 0 and axis % 2 == 0 for axis in axes):
        return axes[0], axes[1], axes[2]
    given = "no axes of its rotary embedding"
    if stated is not None:
        given = f"header metadata {ROPE_AXES_KEY} = {shown(stated)}"
    raise CheckpointError(
        f"{checkpoint.path}: a FramePack transformer with heads of {head_dim} and {given}; expected heads of 128, or "
        f'three even numbers such as "4,6,6" that add up to {head_dim}; write {ROPE_AXES_KEY} into the file\'s metadata'
    )
