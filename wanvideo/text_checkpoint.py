"""Text encoder files: which layout, which dimensions, where the tokenizer is; and loading them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.file_kinds import file_kind
from ..weights.formats import assign_formats, format_for
from ..weights.linear import DenseProjection, Linear, Projection, Scratch
from ..weights.reader import Checkpoint, CheckpointError, TensorInfo, open_checkpoint
from .text_encoder import TextEncoder, UMT5Config, UMT5Encoder
from .text_gguf import gguf_names, gguf_spiece, use_packed_table
from .tokenizer import Tokenizer

TOKENIZER = "spiece_model"  # the tensor that holds a spiece.model
WANTED = "expected a umt5-xxl encoder for Wan"
ADVICE = "choose a file such as umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors"


def load_text_encoder(
    path: str | Path,
    *,
    num_tokens: int = 512,
    dtype: torch.dtype | None = None,
    tokenizer_path: str | Path | None = None,
) -> TextEncoder:
    """Load a text encoder onto the CPU, its weights in the dtype they are stored in.

    `dtype` is what it computes in (see `TextEncoder`). The tokenizer is `tokenizer_path` if given, else the one in
    the file, else a `spiece.model` near it. Raises CheckpointError when the file or its tokenizer cannot be used.
    """
    config, checkpoint = open_text_encoder(path)
    tokenizer = open_tokenizer(checkpoint, num_tokens, tokenizer_path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: has {config.vocab_size} token embeddings and a tokenizer of {tokenizer.vocab_size} "
            "pieces; expected the two of one model; use the spiece.model of this encoder (google/umt5-xxl)"
        )
    model = build_text_encoder(config, checkpoint)
    # In the order of the file, which is the fastest way through it.
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (str(info.file), info.offset)):
        if info.name != TOKENIZER:
            _assign(model, info.name, checkpoint.read(info.name))
    return TextEncoder(model, tokenizer, dtype)


def build_text_encoder(config: UMT5Config, checkpoint: Checkpoint) -> UMT5Encoder:
    """The model on the meta device: every tensor of the stored dtype, scaled layers with their scales."""
    model = UMT5Encoder(config, device="meta")
    assign_formats(model, checkpoint)
    use_packed_table(model, checkpoint)
    for name, info in checkpoint.tensors.items():
        if name != TOKENIZER:
            _assign(model, name, torch.empty(info.shape, dtype=info.dtype, device="meta"))
    return model.eval()


def open_text_encoder(path: str | Path) -> tuple[UMT5Config, Checkpoint]:
    """Read a text encoder file's header: its dimensions, and its tensors under `UMT5Encoder`'s names.

    Accepts the Hugging Face layout (also ComfyUI's repackaged files, encoder-only files and prefixed ones), the
    official Wan layout and llama.cpp's in GGUF files. The tokenizer, where the file has it as a tensor, stays in as
    `spiece_model`, and the scale of a scaled fp8 weight as `<layer>.scale_weight`. Raises CheckpointError, which says
    what a file for another slot is.
    """
    checkpoint = open_checkpoint(path)
    checkpoint = checkpoint.renamed(model_names(checkpoint))
    config = infer_config(checkpoint)
    check_tensors(config, checkpoint)
    return config, checkpoint


def dense_weights(path: str | Path, dtype: torch.dtype) -> tuple[UMT5Config, dict[str, Tensor]]:
    """A GGUF encoder unpacked, in the Hugging Face layout, with its tokenizer as the uint8 tensor `spiece_model`.

    One tensor is read and unpacked at a time. Raises CheckpointError as `open_text_encoder` and `open_tokenizer`.
    """
    config, checkpoint = open_text_encoder(path)
    spiece = open_tokenizer(checkpoint).processor.serialized_model_proto()
    weights: dict[str, Tensor] = {TOKENIZER: torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: item[1].offset):
        if name != TOKENIZER:
            weights[name] = format_for(info).dequantize({"weight": checkpoint.read(name)}, dtype)
    return config, weights


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

SUFFIXES: Mapping[str, str] = {"weight": "weight", "scale_weight": "scale_weight", "weight_scale": "scale_weight"}
# What the encoder does without: input scales (activations are not quantised), format notes, the decoder.
UNUSED = re.compile(r"(.+\.)?(scale_input|input_scale|comfy_quant)|scaled_fp8|logit_scale|lm_head\..+|decoder\..+")

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
    embeddings = [name for name, ours in names.items() if ours == "shared.weight"]
    for copy in embeddings[1:]:  # `shared` and `encoder.embed_tokens` are one table, saved twice by some tools
        names[copy] = None
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
    return f"{layer}.{SUFFIXES.get(suffix, suffix)}"


def _from_official(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    suffix = SUFFIXES.get(suffix, suffix)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
    if block is None:
        return f"{FROM_OFFICIAL.get(layer, layer)}.{suffix}"
    return f"encoder.block.{block[1]}.{FROM_OFFICIAL.get(block[2], block[2])}.{suffix}"


# --- dimensions ------------------------------------------------------------------------------------------


def infer_config(checkpoint: Checkpoint) -> UMT5Config:
    """Every dimension from names and shapes. Raises CheckpointError for another kind of T5."""
    block = "encoder.block.0."
    num_layers = 1 + max(
        int(match[1]) for name in checkpoint.tensors if (match := re.match(r"encoder\.block\.(\d+)\.", name))
    )
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
    shape = info.logical_shape or info.shape
    if len(shape) != 2:
        raise CheckpointError(f"{checkpoint.path}: {name} has shape {list(shape)}; expected two dimensions; {ADVICE}")
    return shape[0], shape[1]


STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def check_tensors(config: UMT5Config, checkpoint: Checkpoint) -> None:
    """CheckpointError unless the file holds the encoder's tensors, all of them, in shapes and dtypes it can use."""
    model = UMT5Encoder(config, device="meta")
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    scales = {f"{name}.scale_weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    weights = {name: info for name, info in checkpoint.tensors.items() if name not in scales and name != TOKENIZER}
    for problem, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("holds unknown tensors, such as", weights.keys() - expected.keys()),
    ):
        if names:
            raise CheckpointError(f"{checkpoint.path}: {problem} {_some(names)}; {WANTED}; {ADVICE}")
    for name in scales & checkpoint.tensors.keys():
        shape, layer = checkpoint.tensors[name].shape, name.removesuffix(".scale_weight")
        if shape not in ((), (1,), (expected[f"{layer}.weight"][0], 1)):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(shape)}; expected one scale, or one per row of {layer}; "
                f"{ADVICE}"
            )
    packable = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    packable.add("shared.weight")
    for name, info in weights.items():
        if (info.quant and name not in packable) or (not info.quant and info.dtype not in STORED_DTYPES):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is stored as {info.quant or info.dtype}; "
                f"expected one of {', '.join(str(dtype) for dtype in STORED_DTYPES)}; {ADVICE}"
            )
        shape = info.logical_shape or info.shape
        if shape != expected[name]:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(shape)}; expected {list(expected[name])} "
                "beside the file's other tensors; download it again"
            )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --- weights and tokenizer -------------------------------------------------------------------------------


class ScaledCast:
    """A weight stored in float8 with a scale, `weight * scale_weight`; the scale is a scalar or one per row."""

    name = "scaled cast"

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        out = scratch.take(packed["weight"].shape) if scratch else None
        return DenseProjection(self.dequantize(packed, dtype, out), bias)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        return packed["weight"].numel()

    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        # By way of float32: rounding the scale to bfloat16 would shift the whole layer by up to 0.4 %.
        weight = packed["weight"].float().mul_(packed["scale_weight"].float())
        return weight.to(dtype) if out is None else out.copy_(weight)


SCALED_CAST = ScaledCast()


def _assign(model: UMT5Encoder, name: str, tensor: Tensor) -> None:
    layer, _, leaf = name.rpartition(".")
    module = model.get_submodule(layer)
    if leaf == "scale_weight":
        assert isinstance(module, Linear)  # check_tensors refuses others
        module.register_buffer(leaf, tensor)
        module.format = SCALED_CAST
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


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
    return checkpoint.read(info.name).view(torch.uint8).numpy().tobytes()


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
