"""The encoders' files: which model, which dimensions, under which names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from ...runtime.layer_reading import TokenTable, without_table
from ...weights.files.checkpoint import Checkpoint, CheckpointError
from ...weights.files.dimensions import Dimensions
from ...weights.files.kinds import file_kind
from ...weights.files.open import open_checkpoint
from ...weights.linear.adopt import adopt_tensors
from ...weights.linear.dialects import plain_dialect, with_plain_parts
from ...weights.linear.fitting import fit_tensors
from .clip_text import ClipTextConfig, ClipTextModel
from .llama import LlamaConfig, LlamaDecoder
from .llama_gguf import gguf_names
from .siglip import SiglipConfig, SiglipVisionModel

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

# FramePack reads the third hidden state from the end: the last two layers and the last norm are not run.
NUM_UNUSED_LAYERS = 2
LLAMA_HEAD_DIM, CLIP_HEAD_DIM, SIGLIP_HEAD_DIM = 128, 64, 72


@dataclass(frozen=True)
class EncoderKind:
    """A kind of encoder in words for messages; `mark` is a name that only it has, `unused` what is not read of it."""

    title: str
    mark: str
    unused: re.Pattern[str]
    file_names: str


LLAMA = EncoderKind(
    "a LLaMA 3 text encoder",
    "layers.0.mlp.gate_proj.weight",
    re.compile(r"norm\.weight|.*\.inv_freq"),
    "llava_llama3_fp16.safetensors or llava_llama3_fp8_scaled.safetensors",
)
CLIP = EncoderKind(
    "a CLIP-L text encoder",
    "embeddings.token_embedding.weight",
    re.compile(r".*position_ids|text_projection(\.weight)?|logit_scale"),
    "clip_l.safetensors",
)
SIGLIP = EncoderKind(
    "a SigLIP vision model",
    "embeddings.patch_embedding.weight",
    re.compile(r"head\..+|.*position_ids"),
    "sigclip_vision_patch14_384.safetensors",
)


@dataclass(frozen=True)
class EncoderFile(Generic[C, M]):
    """An opened encoder: `checkpoint` has the layers that run, without the token embeddings of a text encoder."""

    kind: EncoderKind
    config: C
    checkpoint: Checkpoint
    network: Callable[[C], M]

    def build(self) -> M:
        """The model on the meta device. Raises CheckpointError."""
        with torch.device("meta"):
            model = self.network(self.config)
        return adopt_tensors(model, self.checkpoint, self.kind.title, self.kind.file_names)


@dataclass(frozen=True)
class TextEncoderFile(EncoderFile[C, M]):
    """An opened text encoder; its token embeddings are in `table`."""

    table: TokenTable


def open_llama(path: Path) -> TextEncoderFile[LlamaConfig, LlamaDecoder]:
    """Read the header of a LLaMA file; Hugging Face's names with any prefix, or llama.cpp's. Raises CheckpointError."""
    return llama_of(open_checkpoint(path))


def llama_of(checkpoint: Checkpoint) -> TextEncoderFile[LlamaConfig, LlamaDecoder]:
    """`open_llama` of an opened file."""
    checkpoint = _own_tensors(checkpoint, LLAMA)
    sizes = Dimensions(checkpoint, LLAMA.title)
    num_layers = sizes.num_blocks("layers") - NUM_UNUSED_LAYERS
    if num_layers < 1:
        raise CheckpointError(
            f"{checkpoint.path}: {LLAMA.title} of {num_layers + NUM_UNUSED_LAYERS} layers; expected 32; "
            f"the file is incomplete: download {LLAMA.file_names} again"
        )
    query_dim, dim = sizes.shape("layers.0.self_attn.q_proj.weight", 2)
    key_dim, _ = sizes.shape("layers.0.self_attn.k_proj.weight", 2)
    num_heads, num_kv_heads = (_num_heads(checkpoint, LLAMA, width, LLAMA_HEAD_DIM) for width in (query_dim, key_dim))
    vocab_size, _ = sizes.shape("embed_tokens.weight", 2)
    config = LlamaConfig(
        vocab_size=vocab_size,
        dim=dim,
        ffn_dim=sizes.shape("layers.0.mlp.gate_proj.weight", 2)[0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=LLAMA_HEAD_DIM,
        num_layers=num_layers,
        interleaved=checkpoint.path.suffix.lower() == ".gguf",
    )
    unused = {name: None for name in checkpoint.tensors if _layer_number(name) >= num_layers}
    layers, table = without_table(checkpoint.renamed(unused), "embed_tokens.weight")
    return TextEncoderFile(LLAMA, config, _fitted(LlamaDecoder, config, layers), LlamaDecoder, table)


def open_clip(path: Path) -> TextEncoderFile[ClipTextConfig, ClipTextModel]:
    """Read the header of a CLIP text model; Hugging Face's names with any prefix. Raises CheckpointError."""
    return clip_of(open_checkpoint(path))


def clip_of(checkpoint: Checkpoint) -> TextEncoderFile[ClipTextConfig, ClipTextModel]:
    """`open_clip` of an opened file."""
    checkpoint = _own_tensors(checkpoint, CLIP)
    sizes = Dimensions(checkpoint, CLIP.title)
    vocab_size, dim = sizes.shape(CLIP.mark, 2)
    config = ClipTextConfig(
        vocab_size=vocab_size,
        dim=dim,
        ffn_dim=sizes.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_heads=_num_heads(checkpoint, CLIP, dim, CLIP_HEAD_DIM),
        num_layers=sizes.num_blocks("encoder.layers"),
        num_positions=sizes.shape("embeddings.position_embedding.weight", 2)[0],
    )
    layers, table = without_table(checkpoint, CLIP.mark)
    return TextEncoderFile(CLIP, config, _fitted(ClipTextModel, config, layers), ClipTextModel, table)


def open_siglip(path: Path) -> EncoderFile[SiglipConfig, SiglipVisionModel]:
    """Read the header of a SigLIP vision model; Hugging Face's names with any prefix. Raises CheckpointError."""
    return siglip_of(open_checkpoint(path))


def siglip_of(checkpoint: Checkpoint) -> EncoderFile[SiglipConfig, SiglipVisionModel]:
    """`open_siglip` of an opened file."""
    checkpoint = _own_tensors(checkpoint, SIGLIP)
    sizes = Dimensions(checkpoint, SIGLIP.title)
    dim, _, patch_size, _ = sizes.shape(SIGLIP.mark, 4)
    config = SiglipConfig(
        dim=dim,
        ffn_dim=sizes.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_heads=_num_heads(checkpoint, SIGLIP, dim, SIGLIP_HEAD_DIM),
        num_layers=sizes.num_blocks("encoder.layers"),
        patch_size=patch_size,
    )
    num_tokens = sizes.shape("embeddings.position_embedding.weight", 2)[0]
    if num_tokens != config.num_tokens:
        raise CheckpointError(
            f"{checkpoint.path}: {SIGLIP.title} of {num_tokens} patches of {patch_size} pixels; expected 729 of 14, "
            f"those of a picture of 384 x 384; choose {SIGLIP.file_names}"
        )
    return EncoderFile(SIGLIP, config, _fitted(SiglipVisionModel, config, checkpoint), SiglipVisionModel)


def _fitted(network: Callable[[C], nn.Module], config: C, checkpoint: Checkpoint) -> Checkpoint:
    with torch.device("meta"):
        return fit_tensors(network(config), checkpoint)


# --- names -----------------------------------------------------------------------------------------------


def _own_tensors(checkpoint: Checkpoint, kind: EncoderKind) -> Checkpoint:
    """A file's tensors of one encoder, under the encoder's names and in one dialect of quantisation."""
    checkpoint = with_plain_parts(checkpoint)
    packed = gguf_names(checkpoint.tensors) if kind is LLAMA else None
    if packed is not None:
        return checkpoint.renamed(packed)
    prefix = _prefix(checkpoint, kind)
    names: dict[str, str | None] = {}
    for name in checkpoint.tensors:
        bare = name.removeprefix(prefix)
        foreign = not name.startswith(prefix) or kind.unused.fullmatch(bare)
        names[name] = None if foreign else bare
    return plain_dialect(checkpoint.renamed(names), names)


def _prefix(checkpoint: Checkpoint, kind: EncoderKind) -> str:
    """What stands before an encoder's names. CheckpointError, which says what the file is, for another model."""
    for name in checkpoint.tensors:
        if name != kind.mark and not name.endswith("." + kind.mark):
            continue
        prefix = name.removesuffix(kind.mark)
        if prefix + "embeddings.class_embedding" not in checkpoint.tensors:  # CLIP's vision model has one
            return prefix
    raise CheckpointError(
        f"{checkpoint.path}: this is {file_kind(checkpoint.tensors).title}; expected {kind.title}; "
        f"choose {kind.file_names}"
    )


def _layer_number(name: str) -> int:
    match = re.match(r"layers\.([0-9]{1,6})\.", name)
    return -1 if match is None else int(match[1])


def _num_heads(checkpoint: Checkpoint, kind: EncoderKind, width: int, head_dim: int) -> int:
    if width < head_dim or width % head_dim:
        raise CheckpointError(
            f"{checkpoint.path}: {kind.title} with attention {width} wide; expected heads of {head_dim}; "
            f"the file is another variant: choose {kind.file_names}"
        )
    return width // head_dim
