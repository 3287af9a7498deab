"""Text encoder files: which layout, which dimensions, where the tokenizer is; and loading them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...runtime.layer_reading import LayerReader, TokenTable, without_table
from ...weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ...weights.files.dimensions import Dimensions, check_sizes
from ...weights.files.kinds import file_kind
from ...weights.files.open import open_checkpoint
from ...weights.linear.adopt import adopt_tensors
from ...weights.linear.dialects import plain_dialect, with_plain_parts
from ...weights.linear.fitting import fit_tensors
from .encoder import TextEncoder, UMT5Config, UMT5Encoder
from .gguf import gguf_names, gguf_spiece
from .tokenizer import MOST_BYTES, Tokenizer

TOKENIZER = "spiece_model"  # the tensor that holds a spiece.model
WANTED = "expected a umt5-xxl encoder for Wan"
TITLE = "a umt5-xxl encoder"
FILE_NAMES = "a file such as umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors"
ADVICE = f"choose {FILE_NAMES}"


BLOCKS, NORM, TABLE = "encoder.block", "encoder.final_layer_norm.weight", "shared.weight"


def load_text_encoder(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    num_tokens: int = 512,
    dtype: torch.dtype | None = None,
    tokenizer_path: str | Path | None = None,
    keep: bool = False,
) -> TextEncoder:
    """Open a text encoder whose blocks are read, as they are stored, whenever it encodes: little of it is in RAM.

    With `keep` they stay in RAM afterwards. `dtype` is what it computes in (see `TextEncoder`). The tokenizer is
    `tokenizer_path` if given, else the one in the file, else a `spiece.model` near it. Raises CheckpointError when the
    file or its tokenizer cannot be used.
    """
    file = open_text_encoder(path)
    tokenizer = file.tokenizer(num_tokens, tokenizer_path)
    model = file.build()
    model.stream = LayerReader(file.checkpoint, BLOCKS, torch.device(device), keep)
    model.encoder.final_layer_norm.weight = nn.Parameter(file.checkpoint.read(NORM), requires_grad=False)
    return TextEncoder(model, file.table.rows, tokenizer, torch.device(device), dtype)


@dataclass(frozen=True)
class TextEncoderFile:
    """An opened UMT5: `checkpoint` has the blocks and the last norm, `table` the token embeddings.

    `spiece` has the tensor of a `spiece.model`, where the file has one.
    """

    config: UMT5Config
    checkpoint: Checkpoint
    table: TokenTable
    spiece: Checkpoint

    def build(self) -> UMT5Encoder:
        """The model on the meta device. Raises CheckpointError."""
        return adopt_tensors(UMT5Encoder(self.config, "meta"), self.checkpoint, TITLE, FILE_NAMES)

    def tokenizer(self, num_tokens: int = 512, tokenizer_path: str | Path | None = None) -> Tokenizer:
        """The encoder's tokenizer; CheckpointError says what to put where if there is none."""
        tokenizer = open_tokenizer(self.spiece, num_tokens, tokenizer_path)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self.checkpoint.path}: has {self.config.vocab_size} token embeddings and a tokenizer of "
                f"{tokenizer.vocab_size} pieces; expected the two of one model; use the spiece.model of this encoder "
                "(google/umt5-xxl)"
            )
        return tokenizer


def open_text_encoder(path: str | Path) -> TextEncoderFile:
    """Read a text encoder file's header: its dimensions, and its tensors under `UMT5Encoder`'s names.

    Accepts the Hugging Face layout (also ComfyUI's repackaged files, encoder-only files and prefixed ones), the
    official Wan layout and llama.cpp's in GGUF files, quantised in any dialect of `weights/linear/dialects.py`. Raises
    CheckpointError, which says what a file for another slot is.
    """
    return text_encoder_of(open_checkpoint(path))


def text_encoder_of(checkpoint: Checkpoint) -> TextEncoderFile:
    """`open_text_encoder` of an opened file."""
    checkpoint = with_plain_parts(checkpoint)
    names = model_names(checkpoint)
    checkpoint = plain_dialect(checkpoint.renamed(names), names)
    config = infer_config(checkpoint)
    _check_dtypes(checkpoint)
    spiece = {name: info for name, info in checkpoint.tensors.items() if name == TOKENIZER}
    layers, table = without_table(checkpoint.renamed({TOKENIZER: None}), TABLE)
    layers = fit_tensors(UMT5Encoder(config, "meta"), layers)
    file = TextEncoderFile(config, layers, table, Checkpoint(checkpoint.path, spiece, checkpoint.metadata))
    file.build()  # refuses a file that does not fit before anything runs
    return file


# --- names -----------------------------------------------------------------------------------------------

# Our name -> the name in the official Wan layout (Wan-Video/Wan2.1 `wan/modules/t5.py`); both without the suffix.
TOP_NAMES: Mapping[str, str] = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
}
BLOCK_NAMES: Mapping[str, str] = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
FROM_OFFICIAL = {official: ours for ours, official in (*TOP_NAMES.items(), *BLOCK_NAMES.items())}

UNUSED = re.compile(r"logit_scale|lm_head\..+|decoder\..+")

HUGGING_FACE_MARK = "block.0.layer.0.SelfAttention.q.weight"
OFFICIAL_MARK = "blocks.0.attn.q.weight"


def model_names(checkpoint: Checkpoint) -> dict[str, str | None]:
    """`{name in the file: our name, or None to leave it out}` for `Checkpoint.renamed`.

    Left out are what the encoder does without and other models packed into the same file.
    """
    packed = gguf_names(checkpoint.tensors)
    if packed is not None:
        return packed
    names: dict[str, str | None] = {}
    prefix, official = _layout(checkpoint)
    for name in checkpoint.tensors:
        bare = name.removeprefix(prefix)
        if name.rpartition(".")[2] == TOKENIZER:
            names[name] = TOKENIZER
        elif UNUSED.fullmatch(bare) or not name.startswith(prefix):
            names[name] = None
        else:
            names[name] = _from_official(bare) if official else _from_hugging_face(bare)
    found: set[str | None] = set()
    for name, ours in names.items():  # `shared` and `encoder.embed_tokens` are one table, saved twice by some tools
        if (ours or "").startswith("shared.") and ours in found:
            names[name] = None
        found.add(ours)
    return names


def _layout(checkpoint: Checkpoint) -> tuple[str, bool]:
    """The prefix before every name, and whether the layout is the official one."""
    for name in checkpoint.tensors:
        if name == OFFICIAL_MARK or name.endswith("." + OFFICIAL_MARK):
            return name.removesuffix(OFFICIAL_MARK), True
        if name == HUGGING_FACE_MARK or name.endswith("." + HUGGING_FACE_MARK):
            stack = name.removesuffix(HUGGING_FACE_MARK)
            if not f".{stack}".endswith(".decoder."):
                return stack.removesuffix("encoder.") if f".{stack}".endswith(".encoder.") else stack, False
    what = file_kind(checkpoint.tensors).title
    raise CheckpointError(f"{checkpoint.path}: this is {what}; {WANTED}; {ADVICE}")


def _from_hugging_face(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    if layer == "encoder.embed_tokens" or layer == "embed_tokens":
        layer = "shared"
    elif layer.startswith("block.") or layer == "final_layer_norm":
        layer = "encoder." + layer  # a file of the stack alone
    return f"{layer}.{suffix}"


def _from_official(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
    if block is None:
        return f"{FROM_OFFICIAL.get(layer, layer)}.{suffix}"
    return f"encoder.block.{block[1]}.{FROM_OFFICIAL.get(block[2], block[2])}.{suffix}"


# --- dimensions ------------------------------------------------------------------------------------------


def infer_config(checkpoint: Checkpoint) -> UMT5Config:
    """Every dimension from names and shapes. Raises CheckpointError for another kind of T5."""
    block = "encoder.block.0."
    check_sizes(checkpoint)
    num_layers = Dimensions(checkpoint, TITLE).num_blocks("encoder.block")
    if block + "layer.1.DenseReluDense.wi.weight" in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path}: this is a T5 v1.0 encoder (ungated); {WANTED}; {ADVICE}")
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    if num_layers > 1 and not any(bias.format(n) in checkpoint.tensors for n in range(1, num_layers)):
        raise CheckpointError(
            f"{checkpoint.path}: this is a T5-XXL (Flux/SD3) file, one position bias for all layers, "
            f"and Wan needs umt5-xxl; {WANTED}; {ADVICE}"
        )
    vocab_size, dim = _matrix(checkpoint, "shared.weight")
    attention_dim, _ = _matrix(checkpoint, block + "layer.0.SelfAttention.q.weight")
    ffn_dim, _ = _matrix(checkpoint, block + "layer.1.DenseReluDense.wi_0.weight")
    num_buckets, num_heads = _matrix(checkpoint, bias.format(0))
    if attention_dim % num_heads:
        raise CheckpointError(
            f"{checkpoint.path}: attention width {attention_dim} is not divisible by its {num_heads} heads; "
            f"{WANTED}; download it again"
        )
    return UMT5Config(vocab_size, dim, attention_dim, ffn_dim, num_heads, num_layers, num_buckets)


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{checkpoint.path}: {name} is missing; {WANTED}; {ADVICE}")
    shape = info.unpacked_shape
    if len(shape) != 2:
        raise CheckpointError(f"{checkpoint.path}: {name} has shape {list(shape)}; expected two dimensions; {ADVICE}")
    return shape[0], shape[1]


STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def _check_dtypes(checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight") and not info.quant and info.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is stored as {info.dtype}; "
                f"expected one of {', '.join(str(dtype) for dtype in STORED_DTYPES)}; {ADVICE}"
            )


# --- tokenizer -------------------------------------------------------------------------------------------


def open_tokenizer(
    checkpoint: Checkpoint, num_tokens: int = 512, tokenizer_path: str | Path | None = None
) -> Tokenizer:
    """The tokenizer of a text encoder file; CheckpointError says what to put where if there is none."""
    info = checkpoint.tensors.get(TOKENIZER)
    try:
        if tokenizer_path is not None:
            return Tokenizer.from_file(tokenizer_path, num_tokens)
        if info is not None:
            return Tokenizer.from_bytes(_bytes(checkpoint, info), num_tokens)
        if checkpoint.path.suffix.lower() == ".gguf" and (spiece := gguf_spiece(checkpoint.path)) is not None:
            return Tokenizer.from_bytes(spiece, num_tokens)
        for place in _tokenizer_places(checkpoint.path):
            if place.is_file():
                return Tokenizer.from_file(place, num_tokens)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint.path}: its tokenizer cannot be read: {error}") from error
    raise CheckpointError(
        f"{checkpoint.path}: has no tokenizer inside (no tensor `{TOKENIZER}`) and no spiece.model beside it; "
        f"expected one of the two; put spiece.model of google/umt5-xxl at "
        f"{_tokenizer_places(checkpoint.path)[0]}, or choose ComfyUI's repackaged umt5_xxl file, which has it inside"
    )


def _bytes(checkpoint: Checkpoint, info: TensorInfo) -> bytes:
    if info.nbytes > MOST_BYTES:
        raise ValueError(f"it has {info.nbytes:,} bytes; expected at most {MOST_BYTES:,}")
    return checkpoint.read(info.name).reshape(-1).view(torch.uint8).numpy().tobytes()


def _tokenizer_places(path: Path) -> list[Path]:
    """Beside the file, in the official release's folders, or in a diffusers folder's sibling `tokenizer`."""
    folder = path.parent
    folders = (
        folder,
        folder / "tokenizer",
        folder / "google" / "umt5-xxl",
        folder.parent / "tokenizer",
    )
    return [place / "spiece.model" for place in folders]
