"""Wan transformer files: key layouts, dimensions from names and shapes, loading without a second copy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..system.plain_text import shown
from ..weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..weights.files.dimensions import Dimensions, model_prefix, stated_number, with_kernels
from ..weights.files.kinds import WantedKind, check_kind, file_kind
from ..weights.files.open import open_checkpoint
from ..weights.linear.adopt import adopt_tensors
from ..weights.linear.dialects import plain_dialect, with_plain_parts
from ..weights.linear.fitting import fit_tensors
from .network.camera import PIXELS as CAMERA_PIXELS
from .network.config import WanConfig
from .network.model import WanModel

NUM_HEADS_KEY = "lowvram_video.num_heads"  # header metadata, for models whose heads are not 128 wide
HEAD_DIM = 128
TITLE = "a Wan transformer"
WANTED = WantedKind(
    "wan transformer",
    TITLE,
    "a Wan 2.1 or 2.2 transformer",
    "wan2.1_… or wan2.2_…",
    ("wan vae", "umt5 encoder", "clip vision", "wan vace module"),
)


def build_wan(config: WanConfig, checkpoint: Checkpoint) -> WanModel:
    """The model on the meta device, every tensor of the dtype that the file stores. Raises CheckpointError."""
    expected = "a Wan 2.1/2.2 T2V, I2V, FLF2V or TI2V file"
    return adopt_tensors(WanModel(config, device="meta"), checkpoint, "this Wan transformer", expected)


def open_wan(path: str | Path, vace_module: str | Path | None = None) -> tuple[WanConfig, Checkpoint]:
    """Open a Wan 2.1/2.2 transformer in any known layout; its tensors get their official names.

    `path` is a file, an index, a shard or a folder (`open_checkpoint`). Other models packed into the same
    file are left out. `vace_module` is a file of VACE's blocks, which then are the model's. Raises CheckpointError,
    which says what a file is when it is another kind of model.
    """
    module = None if vace_module is None else open_checkpoint(vace_module)
    return wan_of(open_checkpoint(path), module)


def wan_of(checkpoint: Checkpoint, vace_module: Checkpoint | None = None) -> tuple[WanConfig, Checkpoint]:
    """`open_wan` of opened files."""
    check_kind(checkpoint, WANTED)
    checkpoint = _plain(checkpoint)
    if vace_module is not None:
        checkpoint = with_vace_module(checkpoint, _plain(_checked_module(vace_module)))
    config = infer_config(checkpoint)
    return config, fit_tensors(WanModel(config, device="meta"), checkpoint)


def check_file(checkpoint: Checkpoint) -> WanModel:
    """All that loading asks of an opened file but its bytes; CheckpointError where it cannot be loaded."""
    return build_wan(*wan_of(checkpoint))


def with_official_names(checkpoint: Checkpoint) -> Checkpoint:
    """The transformer's tensors by their official names, as they are stored."""
    checkpoint = with_plain_parts(checkpoint)
    return checkpoint.renamed(_names(checkpoint))


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """A file's tensors by official names and in one dialect, its convolutions in their shape."""
    checkpoint = with_plain_parts(checkpoint)
    names = _names(checkpoint)
    checkpoint = with_kernels(plain_dialect(checkpoint.renamed(names), names), KERNELS)
    tensors = {name: _with_leading_one(info) for name, info in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def _names(checkpoint: Checkpoint) -> dict[str, str | None]:
    """`{name in the file: official name, or None for another model's}`."""
    others = {name: None for name in checkpoint.tensors if OTHER_PARTS.search(name)}
    return {**official_names(checkpoint.tensors), **others}


# The convolutions to tokens: their kernels.
KERNELS = {
    "patch_embedding": (1, 2, 2),
    "vace_patch_embedding": (1, 2, 2),
    "ref_conv": (2, 2),
    "control_adapter.conv": (2, 2),
}


def _with_leading_one(info: TensorInfo) -> TensorInfo:
    """`[1, n, dim]` for what the official layout stores so; llama.cpp's tools drop dimensions of one."""
    if len(info.shape) == 2 and info.quant is None and re.search(r"(^|\.)(modulation|emb_pos)$", info.name):
        return replace(info, shape=(1, *info.shape))
    return info


# --- VACE in a file of its own ---------------------------------------------------------------------------


def with_vace_module(base: Checkpoint, module: Checkpoint) -> Checkpoint:
    """A text-to-video transformer with the VACE blocks of another file, both plain. CheckpointError unless they fit."""
    if any(name.startswith(VACE) for name in base.tensors):
        raise CheckpointError(
            f"{base.path}: this is a whole VACE model already; expected the text-to-video model that "
            f"{module.path.name} belongs to; leave the VACE module out, or choose that model"
        )
    parts = {name: info for name, info in module.tensors.items() if name.startswith(VACE)}
    widths = [_width(each, name) for each, name in ((base, PATCHES), (module, f"vace_{PATCHES}"))]
    if widths[0] != widths[1]:
        raise CheckpointError(
            f"{module.path}: a VACE module of width {widths[1]}; {base.path.name} has {widths[0]}; expected one of the "
            "same model size; choose the module for it (1.3B is 1536 wide, 14B 5120)"
        )
    return replace(base, tensors={**base.tensors, **parts})


VACE = ("vace_blocks.", "vace_patch_embedding.")
PATCHES = "patch_embedding.bias"


def _width(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.tensors.get(name)
    return 0 if info is None else math.prod(info.unpacked_shape)


def _checked_module(module: Checkpoint) -> Checkpoint:
    if not any(name.startswith(VACE) or f".{VACE[0]}" in name for name in module.tensors):
        raise CheckpointError(
            f"{module.path}: this is {file_kind(module.tensors).title}; expected a VACE module (its names begin with "
            "vace_blocks); choose such a file (Wan2_1-VACE_module_…), or leave it out"
        )
    return module


# --- key layouts -----------------------------------------------------------------------------------------

# The first parts of a Wan transformer's names in either layout: what tells a prefix from a chance match.
ROOTS = (
    "blocks.", "patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "head.", "vace_blocks.",
    "vace_patch_embedding.",
)  # fmt: skip
DIFFUSERS_ROOTS = ("condition_embedder.", "proj_out.", "scale_shift_table")

# diffusers' WanTransformer3DModel -> official; only whole parts of a name match.
DIFFUSERS_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
DIFFUSERS_BLOCK_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",  # the affine norm before cross-attention is the second in order, the third by age
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
    "proj_in": "before_proj",  # of VACE's blocks
    "proj_out": "after_proj",
}

# All-in-one files carry the other models beside the transformer; `norm_added_q` is a diffusers leftover.
OTHER_PARTS = re.compile(
    r"^(vae|first_stage_model|text_encoders?|cond_stage_model|conditioner|clip_vision|image_encoder|model_ema"
    r"|LQ_proj_in)\."
    r"|\.norm_added_q\."
)

BLOCK = re.compile(r"((?:vace_)?blocks\.\d+)\.(.+)")


def official_names(names: Iterable[str]) -> dict[str, str]:
    """`{name in the file: official name}` of a Wan transformer's tensors, from any known prefix and layout.

    Tensors of a quantised layer (scales, markers) move with their layer; names that fit nothing stay.
    """
    names = list(names)
    prefix = model_prefix(names, ROOTS + DIFFUSERS_ROOTS)
    if prefix is None:
        return {name: name for name in names}
    plain = {name: name.removeprefix(prefix) for name in names}
    if any(name.startswith(DIFFUSERS_ROOTS) or ".attn1.to_q." in name for name in plain.values()):
        return {old: _from_diffusers(name) for old, name in plain.items()}
    return plain


def _from_diffusers(name: str) -> str:
    block = BLOCK.fullmatch(name)
    if block is not None:
        return f"{block[1]}.{with_start(block[2], DIFFUSERS_BLOCK_NAMES)}"
    return with_start(name, DIFFUSERS_NAMES)


def with_start(name: str, table: Mapping[str, str]) -> str:
    """The name with its first parts replaced, where the table has them."""
    for start, other in table.items():
        if name == start or name.startswith(start + "."):
            return other + name[len(start) :]
    return name


# --- dimensions ------------------------------------------------------------------------------------------

# Variants with parts of their own, by the start of a name; the first that fits is named.
VARIANTS = {
    "fps_embedding.": "SkyReels-V2 Diffusion Forcing",
    "face_adapter.": "Wan 2.2 Animate",
    "motion_encoder.": "Wan 2.2 Animate",
    "casual_audio_encoder.": "Wan 2.2 S2V",
    "audio_proj.": "an audio-driven Wan (HuMo, InfiniteTalk)",
    "audio_injector.": "Wan 2.2 S2V",
    "patch_embedding_": "a pose-driven Wan (SCAIL, WanDancer)",
    "cam_encoder.": "ReCamMaster",
    "dwpose_embedding.": "UniAnimate",
    "randomref_embedding_pose.": "UniAnimate",
    "add_conv_in.": "RealisDance",
    "motion_controller.": "Wan with motion control",
}
# The same by the parts that are inside its blocks.
BLOCK_VARIANTS = {
    "cam_encoder.": "ReCamMaster",
    "audio_cross_attn.": "an audio-driven Wan (MultiTalk, InfiniteTalk)",
    "ref_adapter.": "Lynx",
}


def variant_name(names: Iterable[str]) -> str | None:
    """The Wan variant with extra parts that these official names belong to, or None for a plain Wan."""
    names = list(names)
    inner = [block[2] for block in map(BLOCK.fullmatch, names) if block is not None]
    for table, found in ((VARIANTS, names), (BLOCK_VARIANTS, inner)):
        for start, title in table.items():
            if any(name.startswith(start) for name in found):
                return title
    return None


def infer_config(checkpoint: Checkpoint) -> WanConfig:
    """The dimensions of a Wan transformer from official names and shapes.

    Raises CheckpointError for a variant that is not supported and for a file that lacks what tells.
    """
    variant = variant_name(checkpoint.tensors)
    if variant is not None:
        raise _unsupported(checkpoint, variant)
    sizes = Dimensions(checkpoint, TITLE)
    if not sizes.has("patch_embedding.weight") and checkpoint.path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{checkpoint.path}: a Wan transformer without patch_embedding.weight, which GGUF tools leave out unless "
            "they put it back (`fix_5d_tensors.py`); expected that tensor; choose another release of the model"
        )
    dim, in_channels, *patch = sizes.shape("patch_embedding.weight", 5)
    image_dim = sizes.shape("img_emb.proj.0.weight", 1)[0] if sizes.has("img_emb.proj.0.weight") else 0
    positions = sizes.shape("img_emb.emb_pos", 3)[1] if sizes.has("img_emb.emb_pos") else 0
    out_channels = sizes.parts("head.head.weight", 2, math.prod(patch))
    return WanConfig(
        model_type=_model_type(sizes, in_channels, out_channels, image_dim, positions),
        dim=dim,
        # The first sizes: packed formats shorten the last.
        ffn_dim=sizes.shape("blocks.0.ffn.0.weight", 2)[0],
        num_heads=_num_heads(checkpoint, dim),
        num_layers=sizes.num_blocks("blocks"),
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=sizes.shape("text_embedding.0.weight", 2)[1],
        freq_dim=sizes.shape("time_embedding.0.weight", 2)[1],
        image_dim=image_dim,
        image_pos_tokens=positions,
        **_extra_inputs(sizes),
        patch_size=(patch[0], patch[1], patch[2]),
    )


def _extra_inputs(sizes: Dimensions) -> dict[str, int]:
    """Dimensions of what some variants take beside the latent, the text and a picture."""
    extra = {}
    if sizes.has("vace_patch_embedding.weight"):
        extra["vace_channels"] = sizes.shape("vace_patch_embedding.weight", 5)[1]
        extra["vace_layers"] = sizes.num_blocks("vace_blocks")
    if sizes.has("ref_conv.weight"):
        extra["reference_channels"] = sizes.shape("ref_conv.weight", 4)[1]
    if sizes.has("control_adapter.conv.weight"):
        extra["camera_channels"] = sizes.shape("control_adapter.conv.weight", 4)[1] // CAMERA_PIXELS**2
    return extra


def _model_type(sizes: Dimensions, in_channels: int, out_channels: int, image_dim: int, positions: int) -> str:
    if sizes.has("vace_patch_embedding.weight"):
        return "vace"
    if sizes.has("control_adapter.conv.weight"):
        return "camera"
    takes_image = in_channels == 2 * out_channels + 4  # noise, image latent and a mask of 4
    if takes_image and out_channels == 16:
        return "flf2v" if image_dim and positions else "i2v"
    if in_channels == out_channels and not image_dim:
        return "ti2v" if out_channels == 48 else "t2v"
    # Fun Control: the latents of a control video, of a first frame, or both, with or without a mask
    if in_channels > out_channels and in_channels % out_channels in (0, 4):
        return "control"
    title = f"a Wan variant with {in_channels} input and {out_channels} output channels"
    raise _unsupported(sizes.checkpoint, title)


def _num_heads(checkpoint: Checkpoint, dim: int) -> int:
    stated = checkpoint.metadata.get(NUM_HEADS_KEY)
    if stated is None and dim % HEAD_DIM == 0:
        return dim // HEAD_DIM
    num_heads = stated_number(stated or "")
    if num_heads and dim % num_heads == 0:
        return num_heads
    given = f"header metadata {NUM_HEADS_KEY} = {shown(stated)}" if stated is not None else "no number of heads"
    raise CheckpointError(
        f"{checkpoint.path}: a Wan transformer of dim {dim} with {given}; expected dim to be a multiple of "
        f"{HEAD_DIM}, or {NUM_HEADS_KEY} to divide it; write that key into the file's metadata"
    )


def _unsupported(checkpoint: Checkpoint, variant: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: this is {variant}, which is not supported by this loader yet; "
        "expected Wan 2.1/2.2 T2V, I2V, FLF2V, TI2V, VACE or Fun; choose one of those files"
    )
