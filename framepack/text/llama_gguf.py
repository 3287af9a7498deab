"""LLaMA 3 as GGUF files: llama.cpp's names, and the tokenizer out of the metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...system.plain_text import shown
from ...weights.files.checkpoint import CheckpointError
from ...weights.files.gguf_header import read_gguf_header
from .bpe import LLAMA_SPLIT, BytePairTokenizer, Part

# llama.cpp's name -> ours, both without the suffix. Source: `gguf.constants`, architecture LLAMA.
TOP_NAMES = {"token_embd": "embed_tokens"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
UNUSED = ("output_norm.weight", "output.weight")

PIECES: Part = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA_SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
FIRST = "tokenizer.ggml.bos_token_id"
CONTROL, USER_DEFINED = 3, 4  # token types that are found in the text whole


def gguf_names(names: Iterable[str]) -> dict[str, str | None] | None:
    """`{name in the file: our name, or None to leave it out}`; None where the layout is not llama.cpp's."""
    names = list(names)
    if "blk.0.ffn_gate.weight" not in names:
        return None
    return {name: None if name in UNUSED else _our_name(name) for name in names}


def _our_name(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", layer)
    if block is not None and block[2] in LAYER_NAMES:
        return f"layers.{block[1]}.{LAYER_NAMES[block[2]]}.{suffix}"
    return f"{TOP_NAMES.get(layer, layer)}.{suffix}"


def gguf_tokenizer(path: Path) -> BytePairTokenizer | None:
    """The tokenizer in a GGUF file's metadata; None for other files and where it has none.

    Raises CheckpointError for one that is not LLaMA 3's.
    """
    if path.suffix.lower() != ".gguf":
        return None
    fields = read_gguf_header(path, {TOKENS, TYPES, MERGES}).fields
    if TOKENS not in fields:
        return None
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "llama-bpe")
    tokens, types, merges = ([] if fields.get(key) is None else fields[key] for key in (TOKENS, TYPES, MERGES))
    are_lists = all(isinstance(field, list) for field in (tokens, types, merges))
    are_lists = are_lists and all(type(token) is str for token in (*tokens, *merges))
    if (kind, split) != ("gpt2", "llama-bpe") or not are_lists or len(tokens) != len(types) or not merges:
        raise CheckpointError(
            f"{path}: its tokenizer is of kind {shown(kind)}, {shown(split)}; expected 'gpt2', 'llama-bpe' with "
            "tokens, types and merges; choose a GGUF file of llava-llama-3-8b"
        )
    try:
        return _tokenizer(tokens, types, merges, fields.get(FIRST))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its tokenizer cannot be read: {error}; choose a GGUF file of llava-llama-3-8b"
        ) from error


def _tokenizer(tokens: list[str], types: list[int], merges: list[str], first: Any) -> BytePairTokenizer:
    vocab = {token: number for number, token in enumerate(tokens)}
    added = [
        {"id": vocab[token], "content": token}
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {"vocab": vocab, "merges": merges, "ignore_merges": True}
    return BytePairTokenizer(model, added, PIECES, first=(first,) if type(first) is int else ())
