"""Plain quantisers for every packed GGUF type, and a writer of GGUF files; for tests and the demo model.

The `gguf` package quantises the types with blocks of 32 only. These for the others round to the nearest value of a
straightforward scale, without llama.cpp's search for a better one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from lowvram_video.weights.kernels.gguf_reference import IQ4_LEVELS
from torch import Tensor

PLAIN = {"F32", "F16", "BF16"}


def quantize(weight: Tensor, quant: str) -> Tensor:
    """`weight [..., columns]` -> the bytes of a type, uint8 `[..., bytes per row]`."""
    if quant in QUANTIZERS:
        blocks = QUANTIZERS[quant](weight.float().reshape(-1, BLOCK_ELEMENTS.get(quant, 256)))
        return blocks.reshape(*weight.shape[:-1], -1)
    kind = gguf.GGMLQuantizationType[quant]
    return torch.from_numpy(gguf.quants.quantize(weight.float().numpy(), kind).copy()).view(torch.uint8)


def write_gguf(
    path: Path, tensors: Mapping[str, tuple[Tensor, str]], arch: str = "wan", fields: Mapping[str, Any] | None = None
) -> Path:
    """Write `{name: (values, type)}`; a uint8 tensor is taken for bytes that are already packed."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (fields or {}).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    for name, (values, quant) in tensors.items():
        packed = values if values.dtype == torch.uint8 else quantize(values, quant)
        if quant in ("F32", "F16"):
            values = values.to({"F32": torch.float32, "F16": torch.float16}[quant])
            writer.add_tensor(name, values.contiguous().numpy())
        else:
            writer.add_tensor(name, packed.numpy(), raw_dtype=gguf.GGMLQuantizationType[quant])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- types with an offset per group ----------------------------------------------------------------------


def _q2_k(x: Tensor) -> Tensor:
    scale, offset, d, dmin, quants = _affine_groups(x.view(-1, 16, 16), 15, 3)
    return torch.cat([scale | (offset << 4), _pack_crumbs(quants), _bytes(d), _bytes(dmin)], 1)


def _q4_k(x: Tensor) -> Tensor:
    scale, offset, d, dmin, quants = _affine_groups(x.view(-1, 8, 32), 63, 15)
    return torch.cat([_bytes(d), _bytes(dmin), _pack_six_bits(scale, offset), _pack_nibbles(quants, 32)], 1)


def _q5_k(x: Tensor) -> Tensor:
    scale, offset, d, dmin, quants = _affine_groups(x.view(-1, 8, 32), 63, 31)
    fifth = sum((quants.view(-1, 8, 32)[:, bit] >> 4) << bit for bit in range(8))
    head = [_bytes(d), _bytes(dmin), _pack_six_bits(scale, offset)]
    return torch.cat([*head, fifth, _pack_nibbles(quants & 15, 32)], 1)


def _affine_groups(x: Tensor, most_scale: int, most_quant: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of groups `[n, g, k]`: scales and offsets `[n, g]`, the two fp16 they count in `[n, 1]`, quants `[n, g * k]`."""
    lowest = x.amin(-1).clamp(max=0)
    step = (x.amax(-1) - lowest).clamp(min=0) / most_quant
    d, dmin = (each.amax(1, keepdim=True).div(most_scale).half() for each in (step, -lowest))
    scale, offset = (_ratio(a, b).round().clamp(0, most_scale) for a, b in ((step, d), (-lowest, dmin)))
    quants = _ratio(x + (dmin.float() * offset)[..., None], (d.float() * scale)[..., None])
    return scale.byte(), offset.byte(), d, dmin, quants.round().clamp(0, most_quant).byte().flatten(1)


def _pack_six_bits(scale: Tensor, offset: Tensor) -> Tensor:
    """Two times 8 values of 6 bits in 12 bytes, as Q4_K and Q5_K have them."""
    first = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    second = offset[:, :4] | ((offset[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (scale[:, 4:] & 15) | ((offset[:, 4:] & 15) << 4)], 1)


# --- types centred on zero -------------------------------------------------------------------------------


def _q3_k(x: Tensor) -> Tensor:
    scale, d, quants = _centred_groups(x.view(-1, 16, 16), 32, 4)
    scale = (scale + 32).byte()
    low = (scale[:, :8] & 15) | ((scale[:, 8:] & 15) << 4)
    high = sum((scale[:, 4 * part : 4 * part + 4] >> 4) << (2 * part) for part in range(4))
    high_bits = sum((quants.view(-1, 8, 32)[:, bit] >> 2) << bit for bit in range(8))
    return torch.cat([high_bits, _pack_crumbs(quants & 3), low, high, _bytes(d)], 1)


def _q6_k(x: Tensor) -> Tensor:
    scale, d, quants = _centred_groups(x.view(-1, 16, 16), 128, 32)
    packed = scale.to(torch.int8).view(torch.uint8)
    return torch.cat([_pack_nibbles(quants & 15, 64), _pack_crumbs(quants >> 4), packed, _bytes(d)], 1)


def _centred_groups(x: Tensor, most_scale: int, most_quant: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups `[n, g, k]`: scales `[n, g]`, the fp16 they count in `[n, 1]`, quants `[n, g * k]` from 0."""
    step = _extreme(x, -1) / -most_quant
    d = (_extreme(step, 1) / -most_scale)[:, None].half()
    scale = _ratio(step, d).round().clamp(-most_scale, most_scale - 1)
    quants = _ratio(x, (d.float() * scale)[..., None]).round().clamp(-most_quant, most_quant - 1)
    return scale, d, (quants + most_quant).byte().flatten(1)


def _iq4_nl(x: Tensor) -> Tensor:
    d = (_extreme(x, -1) / IQ4_LEVELS[0])[:, None].half()
    return torch.cat([_bytes(d), _pack_nibbles(_nearest_level(_ratio(x, d)), 16)], 1)


def _iq4_xs(x: Tensor) -> Tensor:
    x = x.view(-1, 8, 32)
    step = _extreme(x, -1) / IQ4_LEVELS[0]
    d = (_extreme(step, 1) / -32)[:, None].half()
    scale = _ratio(step, d).round().clamp(-32, 31)
    quants = _nearest_level(_ratio(x, (d.float() * scale)[..., None])).flatten(1)
    packed = (scale + 32).byte()
    high = torch.stack([sum((packed[:, 4 * b + k] >> 4) << (2 * k) for k in range(4)) for b in range(2)], 1)
    low = (packed[:, ::2] & 15) | ((packed[:, 1::2] & 15) << 4)
    return torch.cat([_bytes(d), high, low, _pack_nibbles(quants, 16)], 1)


def _nearest_level(x: Tensor) -> Tensor:
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32)
    return (x[..., None] - levels).abs().argmin(-1).byte()


def _extreme(x: Tensor, dim: int) -> Tensor:
    """The value farthest from zero."""
    return x.gather(dim, x.abs().argmax(dim, keepdim=True)).squeeze(dim)


# --- packing ---------------------------------------------------------------------------------------------


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is."""
    b = b.float()
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _bytes(half: Tensor) -> Tensor:
    return half.contiguous().view(torch.uint8)


def _pack_nibbles(quants: Tensor, run: int) -> Tensor:
    """Of every 2 * `run` elements, the first half in the lower nibbles of `run` bytes."""
    pairs = quants.reshape(quants.shape[0], -1, 2, run)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _pack_crumbs(quants: Tensor) -> Tensor:
    """Of every 128 elements, each 32 in two bits of the same 32 bytes."""
    parts = quants.reshape(quants.shape[0], -1, 4, 32)
    return sum(parts[:, :, part] << (2 * part) for part in range(4)).flatten(1)


BLOCK_ELEMENTS = {"IQ4_NL": 32}
QUANTIZERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
