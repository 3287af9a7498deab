"""What a damaged or hostile file may look like: mutations of safetensors, GGUF and JSON, drawn at random."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Draw = random.Random
Header = dict[str, Any]
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 10**400, 1.5, 1e300, float("nan"), float("inf"), "", "x", "0",
    [], [[]], {}, {"a": 1}, [-1, 4], "../../etc/passwd",
)  # fmt: skip
TEXTS = (
    "", "0", "-1", "x", "1e400", "9" * 5000, "1,2,3", "0,0,0", "16,0,0", "999999999,1,1", ",,", "[" * 5000, "[]", "{}",
    '{"layers": 5}', '{"layers": {"blocks.0.ffn.0": 5}}', '{"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}',
    '{"r": 0, "lora_alpha": 1e400}', '{"r": 4, "alpha_pattern": {"(a+)+$": 1}}', '{"alpha_pattern": {"[": 1}}',
    "\ud800", "٣",
)  # fmt: skip
TEXT_KEYS = (
    "_quantization_metadata", "lora_adapter_metadata", "lora_config", "lora_alpha", "modelspec.architecture",
    "lowvram.num_heads", "num_heads", "rope_axes", "model_type", "lowvram_video.rope_axes", "lowvram_video.model_type",
)  # fmt: skip
NAMES = (
    "", " ", ".", "..", "a" * 20000, "\ud800", "\x1b[2J\x1b[31mred", "x\ny", "blocks.99999999.ffn.0.weight",
    "transformer_blocks.99999999.x.weight", f"blocks.{'9' * 5000}.x", "blocks.0" * 500, "blocks.٣.ffn.0.weight",
    "encoder.block.77777777.layer.0.layer_norm.weight", "layers.88888888.x", "decoder.up_blocks.99999999.x",
    "decoder.upsamples.9999999.residual.0.gamma", "down_blocks.123456.resnets.0.x",
    "single_blocks.7777777.linear1.weight",
)  # fmt: skip
MARKERS = (
    b"", b"x", b"[" * 2000, b'{"format": "float8_e4m3fn"}', b'{"format": "int8_tensorwise"}', b'{"format":[]}', b"5",
    b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1e400}', b"\xff" * 4, b'"x"', b"null",
    b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 0}', b'{"format":"nvfp4","group_size":0}',
    struct.pack("<f", math.nan), struct.pack("<f", 0.0), b"\0" * 16, b'{"format":"mxfp8"}', b'{"format":"svdquant"}',
)  # fmt: skip
NOT_MODELS = (
    b"",
    b"{",
    b"GGUF",
    b"PK\x03\x04",
    b"\x80\x02",
    b"<html>" * 20,
    b"\0" * 1000,
    struct.pack("<Q", 2) + b"{}",
)


# --- safetensors -----------------------------------------------------------------------------------------


def parse(raw: bytes) -> tuple[Header, bytes]:
    """A safetensors file's header, and its tensors' bytes."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def build(header: Header | bytes, data: bytes) -> bytes:
    """A safetensors file of them."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def safetensors(raw: bytes, draw: Draw) -> bytes:
    """The file, changed in one of many ways."""
    return draw.choice(SAFETENSORS)(raw, draw)


def cut(raw: bytes, draw: Draw) -> bytes:
    return raw[: draw.randrange(len(raw))]


def flip_header(raw: bytes, draw: Draw) -> bytes:
    changed = bytearray(raw)
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(draw.randrange(1, 6)):
        changed[draw.randrange(min(end, len(raw)))] = draw.randrange(256)
    return bytes(changed)


def header_size(raw: bytes, draw: Draw) -> bytes:
    sizes = (0, 1, 2, 2**63, 2**64 - 1, len(raw), len(raw) - 8, len(raw) - 9, draw.randrange(2**40))
    return struct.pack("<Q", draw.choice(sizes)) + raw[8:]


def offsets(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    entry = _entry(header, draw)
    first, end = entry["data_offsets"]
    entry["data_offsets"] = draw.choice([
        [end, first], [-first - 1, end], [first, end + 2**62], [first + 1, end + 1], [0, end - first],
        [float(first), end], [str(first), end], [True, end], [first], [first, end, end], [], None, {}, [first, None],
        [2**63, 2**63 + end - first], [-(2**70), end - first], "ab", [len(data), len(data) + end - first],
    ])  # fmt: skip
    return build(header, data)


def shape(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    entry = _entry(header, draw)
    old, num = entry["shape"], math.prod(entry["shape"])
    entry["shape"] = draw.choice([
        copy.deepcopy(draw.choice(JUNK)), [-1], [2**63], [2**63, 0], [0], [0] * 3, [2**40, 2**40], [1] * 100, [[1]],
        ["1"], [1.0], [True], [*old, 1], old[::-1], [num], [1, num], [num, 1], [1] * 5 + [num], [0, *old],
        [0 if index == len(old) // 2 else side for index, side in enumerate(old)],
    ])  # fmt: skip
    shape = entry["shape"]
    if isinstance(shape, list) and 0 in shape and draw.random() < 0.7:
        entry["data_offsets"] = [len(data)] * 2
    return build(header, data)


def dtype(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    entry = _entry(header, draw)
    entry["dtype"] = draw.choice([*copy.deepcopy(JUNK), *SIZES, "f32", "F4", "Q4_K", "BF16 ", "C64", ["F32"]])
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    width = SIZES.get(entry["dtype"], 0) if isinstance(entry["dtype"], str) else 0
    if width and size % width == 0 and draw.random() < 0.5:  # the same bytes as another type
        rest = math.prod(entry["shape"][1:]) or 1
        elements = size // width
        entry["shape"] = [elements // rest, *entry["shape"][1:]] if elements % rest == 0 else [elements]
    return build(header, data)


def names(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    old = draw.choice(_names(header))
    new = draw.choice(
        [*NAMES, f"{old}.weight", f"{old}_scale", f"model.diffusion_model.{old}", old.upper(), f"vae.{old}"]
    )
    if draw.random() < 0.5:
        header[new] = header.pop(old)
    else:
        header[new] = {"dtype": header[old]["dtype"], "shape": [0], "data_offsets": [len(data)] * 2}
    return build(header, data)


def metadata(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    if draw.random() < 0.4:
        header["__metadata__"] = draw.choice([
            None, [], "x", 5, {"a": {"b": 1}}, {"a": None}, {"format": 5}, {"k" * 1000: "v" * 10**5}, True,
            {str(index): "x" for index in range(5000)},
        ])  # fmt: skip
    else:
        given = header.get("__metadata__")
        header["__metadata__"] = {**(given or {}), draw.choice(TEXT_KEYS): draw.choice(TEXTS)}
    return build(header, data)


def deep(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    nested, text = _nested(draw), json.dumps(header)
    return build(
        draw.choice([
            f'{{"x":{nested}}}', f'{{"__metadata__":{{"a":{nested}}},{text[1:]}',
            f'{{"deep":{{"dtype":"F32","shape":{nested},"data_offsets":[0,4]}},{text[1:]}',
        ]).encode(),
        data,
    )  # fmt: skip


def missing(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    found = _names(header)
    for name in draw.sample(found, min(len(found), draw.choice([1, 1, 2, 5, max(1, len(found) - 1)]))):
        del header[name]
    return build(header, data)


def swapped(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    one, other = _entry(header, draw), _entry(header, draw)
    if draw.random() < 0.5:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    else:
        one.update(other)
    return build(header, data)


def marker(raw: bytes, draw: Draw) -> bytes:
    """A sign of quantisation beside a layer, with odd content."""
    header, data = parse(raw)
    layer = draw.choice(_names(header)).rpartition(".")[0]
    leaves = ("comfy_quant", "scale_weight", "weight_scale", "scale_input", "weight_scale_2", "weight._data", "alpha")
    stored, content = draw.choice(["U8", "F32", "I8", "F8_E4M3", "BOOL", "F16", "I64"]), draw.choice(MARKERS)
    content += b"\0" * (-len(content) % SIZES[stored])
    num = len(content) // SIZES[stored]
    header[f"{layer}.{draw.choice(leaves)}"] = {
        "dtype": stored, "shape": draw.choice([[num], [], [1], [1, num]]),
        "data_offsets": [len(data), len(data) + len(content)],
    }  # fmt: skip
    return build(header, data + content)


def text(raw: bytes, draw: Draw) -> bytes:
    """A header that is no plain UTF-8 JSON."""
    header, data = parse(raw)
    plain = json.dumps(header)
    return build(
        draw.choice([
            b"\xef\xbb\xbf" + plain.encode(), plain.encode("utf-16"), plain.replace("F32", "F\\ud80032").encode(),
            plain.encode()[:-1] + b',"x":NaN}', plain.encode()[:-1] + b',"x":' + b"9" * 6000 + b"}",
            plain.encode() + b"garbage", plain.encode()[:-1] + b",}", b" " * 10**6 + plain.encode(),
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' + plain.encode()[1:],
        ]),
        data,
    )  # fmt: skip


def elsewhere(raw: bytes, draw: Draw) -> bytes:
    """Bytes behind the last tensor, or before the first."""
    header, data = parse(raw)
    if draw.random() < 0.5:
        return build(header, data + draw.randbytes(draw.randrange(1, 100)))
    for name in _names(header):
        header[name]["data_offsets"] = [place + 64 for place in header[name]["data_offsets"]]
    return build(header, b"\0" * 64 + data)


def no_numbers(raw: bytes, draw: Draw) -> bytes:
    header, data = parse(raw)
    first, end = _entry(header, draw)["data_offsets"]
    return build(header, data[:first] + b"\xff" * (end - first) + data[end:])


def no_model(raw: bytes, draw: Draw) -> bytes:
    return draw.choice([*NOT_MODELS, b"GGUF" + raw, b"PK\x03\x04" + raw, draw.randbytes(draw.randrange(1, 5000))])


SAFETENSORS: Sequence[Callable[[bytes, Draw], bytes]] = (
    cut, flip_header, flip_header, header_size, offsets, shape, shape, dtype, dtype, names, names, metadata, metadata,
    deep, missing, missing, swapped, marker, marker, text, elsewhere, no_numbers, no_model,
)  # fmt: skip


def _names(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _entry(header: Header, draw: Draw) -> Any:
    return header[draw.choice(_names(header))]


def _nested(draw: Draw) -> str:
    depth, (begin, end) = draw.choice([500, 900, 990, 2000, 10**5]), draw.choice([("[", "]"), ('{"a":', "}")])
    return f"{begin * depth}1{end * depth}"


# --- GGUF ------------------------------------------------------------------------------------------------

GGUF_KEYS = (
    b"general.alignment", b"split.count", b"general.architecture", b"comfy.gguf.orig_shape.x_embedder.proj.weight",
    b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type", b"tokenizer.ggml.model",
    b"tokenizer.ggml.precompiled_charsmap", b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.merges",
    b"tokenizer.ggml.pre", b"", b"\xff\xfe", b"k" * 5000,
)  # fmt: skip
GGUF_NAMES = (
    b"a", b"enc.blk.0.attn_q.weight", b"token_embd.weight", b"blk.0.attn_q.weight", b"", b"x" * 300,
    b"blocks.0.ffn.0.weight", b"patch_embedding.weight", b"a\0b", b"enc.blk.99999999.attn_rel_b.weight",
)  # fmt: skip


def gguf(raw: bytes, draw: Draw) -> bytes:
    """The file, changed in one of many ways, or another tiny one."""
    kind, head = draw.randrange(10), min(len(raw), 6000)
    num_tensors, num_fields = struct.unpack("<QQ", raw[8:24])
    changed = bytearray(raw)
    if kind == 0:
        return raw[: draw.randrange(len(raw))]
    if kind <= 2:
        for _ in range(draw.randrange(1, 5)):
            changed[draw.randrange(4, head)] = draw.choice([0, 1, 0xFF, 0x7F, 0x80, draw.randrange(256)])
        return bytes(changed)
    if kind == 3:
        counts = draw.choice([0, 1, num_tensors + 1, 2**31, 2**63, 2**64 - 1]), draw.choice([num_fields, 0, 2**63])
        return raw[:8] + struct.pack("<QQ", *counts) + raw[24:]
    if kind == 4:
        return raw[:4] + struct.pack("<I", draw.choice([0, 1, 4, 2**31, 3 << 24])) + raw[8:]
    if kind == 5:
        place = draw.randrange(24, head - 8)
        sizes = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, len(raw))
        changed[place : place + 8] = struct.pack("<Q", draw.choice(sizes))
        return bytes(changed)
    if kind == 6:
        count = draw.randrange(1, 4)
        fields = b"".join(_field(draw) for _ in range(count))
        return raw[:16] + struct.pack("<Q", num_fields + count) + fields + raw[24:]
    if kind == 7:
        return draw.choice([*NOT_MODELS, b"GGUF\x03\0\0\0", raw[:24] + b"\0" * len(raw), raw + draw.randbytes(99)])
    return small_gguf(draw)


def small_gguf(draw: Draw) -> bytes:
    """A GGUF of a few absurd tensors and fields."""
    tensors, fields = draw.randrange(6), draw.randrange(4)
    sides, places = (0, 1, 2, 32, 256, 2**31, 2**32, 2**63, 2**64 - 1), (0, 0, 32, 1, 2**63, 2**64 - 1)
    body = b"".join(_field(draw) for _ in range(fields))
    for _ in range(tensors):
        name, dims = draw.choice(GGUF_NAMES), [draw.choice(sides) for _ in range(draw.choice([0, 1, 2, 4, 8, 9, 100]))]
        kind = draw.choice([0, 1, 2, 8, 12, 14, 30, 31, 99, 2**31])
        body += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        body += struct.pack("<IQ", kind, draw.choice(places))
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields) + body + b"\0" * draw.choice([0, 64, 4096])


def _field(draw: Draw) -> bytes:
    key = draw.choice(GGUF_KEYS)
    return struct.pack("<Q", len(key)) + key + _gguf_value(draw)


def _gguf_value(draw: Draw) -> bytes:
    kind = draw.randrange(14)
    widths = {0: "B", 1: "B", 2: "H", 3: "H", 4: "I", 5: "I", 7: "B", 10: "Q", 11: "Q"}
    if kind in widths:
        most = 256 ** struct.calcsize(widths[kind])
        return struct.pack(f"<I{widths[kind]}", kind, draw.choice([0, 1, 16, 32, most // 2, most - 1]) % most)
    if kind in (6, 12):
        return struct.pack("<If" if kind == 6 else "<Id", kind, draw.choice([0.0, math.nan, math.inf, -1.0]))
    if kind == 8:
        said = draw.choice([b"", b"t5", b"llama", b"gpt2", b"\xff\xff", b"x" * 1000, b"llama-bpe"])
        return struct.pack("<IQ", 8, len(said)) + said
    if kind != 9:
        return struct.pack("<I", kind)
    of, count = draw.choice([0, 1, 4, 5, 6, 7, 8, 9, 10, 12, 99]), draw.choice([0, 1, 2, 3, 17, 40, 2**40, 2**64 - 1])
    real = min(count, 40)
    if of == 8:
        parts = [draw.choice([b"a", b"", b"\xff", b"<unk>", b"</s>", b"<|begin_of_text|>"]) for _ in range(real)]
        return struct.pack("<IIQ", 9, of, count) + b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    width = {0: 1, 1: 1, 7: 1, 10: 8, 12: 8}.get(of, 4)
    return struct.pack("<IIQ", 9, of, count) + draw.choice([b"\0", b"\xff", b"\x01"]) * (width * real)


# --- JSON and other texts --------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in JSON, at most some hundred of them."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 12)):
            yield from places(value[index], (*path, index))


def json_text(plain: str, draw: Draw, extra: Sequence[Any] = ()) -> bytes:
    """JSON, cut, damaged, nested, or with some of its values others."""
    kind, raw = draw.randrange(10), plain.encode()
    if kind == 0:
        return raw[: draw.randrange(len(raw))]
    if kind == 1:
        return flip(raw, draw)
    if kind == 2:
        return _nested(draw).encode()
    if kind == 3:
        return draw.choice(
            [b"", b"null", b"[]", b"{}", b"5", b'"x"', b"NaN", b"\xff\xfe", b"\xef\xbb\xbf{}", b"9" * 6000]
        )
    value = json.loads(plain)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        _change(value, draw, extra)
    return json.dumps(value).encode()


def _change(value: Any, draw: Draw, extra: Sequence[Any]) -> None:
    found = [path for path in places(value) if path]
    if not found:
        return
    *way, last = draw.choice(found)
    at = value
    for key in way:
        at = at[key]
    if draw.random() < 0.2:
        del at[last]
    else:
        at[last] = copy.deepcopy(draw.choice([*JUNK, *extra]))


def flip(raw: bytes, draw: Draw) -> bytes:
    """Some bytes others."""
    changed = bytearray(raw)
    for _ in range(draw.randrange(1, 6)):
        changed[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(changed)


def any_bytes(raw: bytes, draw: Draw) -> bytes:
    """A file of a format that nobody here parses: cut, flipped, empty, other."""
    return draw.choice([
        raw[: draw.randrange(len(raw))], flip(raw, draw), flip(raw, draw), flip(raw, draw), b"",
        draw.randbytes(draw.randrange(1, 2000)), raw + draw.randbytes(9), raw.replace(b" ", b""), raw * 3,
    ])  # fmt: skip
