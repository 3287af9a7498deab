"""UMT5 encoders as GGUF files: llama.cpp's names, and the tokenizer out of the metadata."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...system.plain_text import shown
from ...weights.files.gguf_header import read_gguf_header

# llama.cpp's name -> ours, both without the suffix. Source: `gguf.constants`, architecture T5ENCODER.
TOP_NAMES = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
BLOCK_NAMES = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
DECODER = re.compile(r"dec\..+|output\.weight")

TOKENS, SCORES, TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
UNUSED, BYTE = 5, 6  # token types, numbered alike in GGUF and in sentencepiece


def gguf_names(names: Iterable[str]) -> dict[str, str | None] | None:
    """`{name in the file: our name, or None to leave it out}`; None where the layout is not llama.cpp's."""
    names = list(names)
    if "enc.blk.0.attn_q.weight" not in names:
        return None
    return {name: None if DECODER.fullmatch(name) else _our_name(name) for name in names}


def _our_name(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(.+)", layer)
    if block is not None and block[2] in BLOCK_NAMES:
        return f"encoder.block.{block[1]}.{BLOCK_NAMES[block[2]]}.{suffix}"
    return f"{TOP_NAMES.get(layer, layer)}.{suffix}"


# --- tokenizer -------------------------------------------------------------------------------------------


def gguf_spiece(path: Path) -> bytes | None:
    """A `spiece.model` made from a GGUF file's metadata; None where it holds no tokenizer.

    Raises CheckpointError for an unreadable file and ValueError for a tokenizer that is not T5's.
    """
    fields = read_gguf_header(path, {TOKENS, SCORES, TYPES, CHARSMAP}).fields
    if TOKENS not in fields:
        return None
    kind = fields.get("tokenizer.ggml.model")
    if kind != "t5" or not _are_lists(fields):
        raise ValueError(f"its tokenizer is of kind {shown(kind)}; expected 't5' with tokens, scores and types")
    return _model_proto(fields)


def _are_lists(fields: Mapping[str, Any]) -> bool:
    """Whether texts, numbers and kinds of the tokens are lists of such, as long as each other, and the map is one."""
    allowed = ((TOKENS, str), (SCORES, float), (TYPES, int))
    lists = [fields.get(key) for key, _ in allowed]
    if not all(isinstance(each, list) and len(each) == len(lists[0] or ()) for each in lists):
        return False
    if not all(type(item) is kind for (key, kind) in allowed for item in fields[key]):
        return False
    charsmap = fields.get(CHARSMAP, [])
    if not isinstance(charsmap, list) or not all(type(item) is int for item in charsmap):
        return False
    return all(abs(item) < 1e30 for item in fields[SCORES]) and all(0 <= item < 2**31 for item in fields[TYPES])


def _model_proto(fields: Mapping[str, Any]) -> bytes:
    """sentencepiece's ModelProto. Source of the numbers: google/sentencepiece `src/sentencepiece_model.proto`."""
    tokens, scores, types = fields[TOKENS], fields[SCORES], fields[TYPES]
    num = len(tokens)
    # The table has more rows than the vocabulary has pieces; llama.cpp fills the list up with unused ones.
    while num and types[num - 1] == UNUSED:
        num -= 1
    parts = []
    for token, score, kind in zip(tokens[:num], scores[:num], types[:num], strict=True):
        piece = _text(1, token) + b"\x15" + struct.pack("<f", score) + _number(3, kind)  # 0x15: field 2, a float
        parts.append(_message(1, piece))
    trainer = _number(3, 1) + _number(4, num) + _number(35, BYTE in types[:num])  # a unigram model
    for key, number in (("unknown", 40), ("bos", 41), ("eos", 42), ("padding", 43)):
        token_id = fields.get(f"tokenizer.ggml.{key}_token_id")
        if type(token_id) is int and 0 <= token_id < num:
            trainer += _number(number, token_id) + _text(number + 5, tokens[token_id])
    charsmap = bytes(byte & 0xFF for byte in fields.get(CHARSMAP, []))
    normalizer = _message(2, charsmap)
    for key, number in (("add_space_prefix", 3), ("remove_extra_whitespaces", 4)):
        normalizer += _number(number, fields.get(f"tokenizer.ggml.{key}", True) not in (False, 0))
    return b"".join(parts) + _message(2, trainer) + _message(3, normalizer)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode("utf-8"))


def _message(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
