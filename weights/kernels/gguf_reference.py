"""GGUF dequantisers in plain torch: slow, obvious, and equal bit for bit to the `gguf` package's own.

Source of the layouts: ggml-org/llama.cpp `ggml/src/ggml-common.h` (the block structs) and `gguf.quants` (the order of
the arithmetic). A tensor is a run of blocks; a block holds 32 or 256 consecutive elements of one row together with
their scales. Below, n is the number of blocks, and a function takes `[n, block_bytes]` uint8 to `[n, elements]` fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.gguf import PACKED_TYPES, PackedType


@dataclass(frozen=True)
class BlockType(PackedType):
    """A packed type and how to unpack its blocks."""

    scales_at: tuple[int, ...]  # byte offsets of the fp16 scales
    unpack: Callable[[Tensor], Tensor]  # [n, nbytes] uint8 -> [n, elements] fp32


def dequantize_reference(packed: Tensor, quant: str, logical_shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of `logical_shape` that packed bytes (uint8, any shape, rows in order) stand for.

    Raises ValueError when the bytes are not those of such a tensor.
    """
    block = BLOCK_TYPES[quant]
    if math.prod(logical_shape) * block.nbytes != packed.numel() * block.elements:
        raise ValueError(
            f"{packed.numel()} bytes of {quant} hold {packed.numel() / block.nbytes * block.elements:.0f} elements; "
            f"expected a tensor of shape {list(logical_shape)}"
        )
    return block.unpack(packed.reshape(-1, block.nbytes)).reshape(logical_shape)


def random_blocks(quant: str, num_blocks: int, generator: torch.Generator) -> Tensor:
    """Valid random bytes `[num_blocks, block bytes]` of a type, for probes and tests: any bits, finite scales."""
    block = BLOCK_TYPES[quant]
    packed = torch.randint(0, 256, (num_blocks, block.nbytes), generator=generator, dtype=torch.uint8)
    for at in block.scales_at:
        scales = torch.randn(num_blocks, 1, generator=generator).mul_(0.01).half()
        packed[:, at : at + 2] = scales.view(torch.uint8)
    return packed


# --- blocks of 32 ----------------------------------------------------------------------------------------


def _q8_0(blocks: Tensor) -> Tensor:
    """fp16 scale, 32 int8."""
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    """fp16 scale, 16 bytes of two nibbles; centred on 8."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    """fp16 scale, fp16 offset, 16 bytes of two nibbles."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    """fp16 scale, 32 fifth bits, 16 bytes of two nibbles; centred on 16."""
    quants = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (quants.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """fp16 scale, fp16 offset, 32 fifth bits, 16 bytes of two nibbles."""
    quants = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * quants.float() + _half(blocks, 2)


# The 16 levels of the IQ4 types, denser near zero as weights are.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_nl(blocks: Tensor) -> Tensor:
    """fp16 scale, 16 bytes of two nibbles that index the levels."""
    return _half(blocks, 0) * _levels(_nibbles(blocks[:, 2:]))


# --- blocks of 256 ---------------------------------------------------------------------------------------


def _q2_k(blocks: Tensor) -> Tensor:
    """16 bytes of 4-bit scale and offset, 64 bytes of four 2-bit quants, fp16 scales of both."""
    scale = (_half(blocks, 80) * (blocks[:, :16] & 15).float())[..., None]
    offset = (_half(blocks, 82) * (blocks[:, :16] >> 4).float())[..., None]
    quants = _crumbs(blocks[:, 16:80], 32).view(-1, 16, 16)
    return (scale * quants.float() - offset).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    """32 bytes of high bits, 64 bytes of four 2-bit quants, 12 bytes of 16 6-bit scales, fp16 scale of those."""
    packed = blocks[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scale = _half(blocks, 108) * ((low | (high << 4)).float() - 32)
    high_bits = torch.stack([(blocks[:, :32] >> bit) & 1 for bit in range(8)], 1).flatten(1)
    # A set bit means that 4 is not subtracted.
    quants = _crumbs(blocks[:, 32:96], 32).float() - (4 - 4 * high_bits.float())
    return (scale[..., None] * quants.view(-1, 16, 16)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    """fp16 scales of scale and offset, 12 bytes of 8 6-bit scales and offsets, 128 bytes of two nibbles."""
    scale, offset = _scales_and_offsets(blocks)
    quants = _nibbles(blocks[:, 16:].reshape(-1, 32)).view(-1, 8, 32)
    return (scale * quants.float() - offset).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit s of byte i belongs to element i of group s."""
    scale, offset = _scales_and_offsets(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 32)).view(-1, 8, 32)
    high = torch.stack([(blocks[:, 16:48] >> bit) & 1 for bit in range(8)], 1)
    return (scale * (low | (high << 4)).float() - offset).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of two nibbles, 64 bytes of four upper 2-bit parts, 16 int8 scales, fp16 scale of those."""
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).view(-1, 256)
    high = _crumbs(blocks[:, 128:192], 32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    quants = (low | (high << 4)).float() - 32
    return (scale[..., None] * quants.view(-1, 16, 16)).flatten(1)


def _iq4_xs(blocks: Tensor) -> Tensor:
    """fp16 scale, 8 6-bit scales in 2 + 4 bytes, 128 bytes of two nibbles that index the levels."""
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], -1).flatten(1)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)
    scale = _half(blocks, 0) * ((low | (high << 4)).float() - 32)
    levels = _levels(_nibbles(blocks[:, 8:].reshape(-1, 16))).view(-1, 8, 32)
    return (scale[..., None] * levels).flatten(1)


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of the 8 groups of a Q4_K or Q5_K block, fp32 `[n, 8, 1]` each.

    Of the 12 bytes, the first and second four hold the 6-bit values of groups 0-3; groups 4-7 have their lower four
    bits in the last four bytes and their upper two in the spare bits of the first eight.
    """
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], 1)
    offset = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], 1)
    return (_half(blocks, 0) * scale.float())[..., None], (_half(blocks, 2) * offset.float())[..., None]


# --- parts of blocks -------------------------------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at a byte offset, fp32 `[n, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(quants: Tensor) -> Tensor:
    """`[m, k] -> [m, 2k]`: all lower nibbles, then all upper ones."""
    return torch.cat([quants & 15, quants >> 4], 1)


def _crumbs(quants: Tensor, run: int) -> Tensor:
    """`[n, m] -> [n, 4m]`: of every `run` bytes all lowest 2-bit parts, then all next ones."""
    quants = quants.reshape(quants.shape[0], -1, run)
    return torch.stack([(quants >> shift) & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)


def _bits(packed: Tensor) -> Tensor:
    """`[n, m] -> [n, 8m]` bits, lowest first."""
    return torch.stack([(packed >> bit) & 1 for bit in range(8)], -1).flatten(1)


def _levels(indices: Tensor) -> Tensor:
    return torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=indices.device)[indices.int()]


UNPACKERS: Mapping[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "Q8_0": ((0,), _q8_0),
    "Q6_K": ((208,), _q6_k),
    "Q5_K": ((0, 2), _q5_k),
    "Q5_1": ((0, 2), _q5_1),
    "Q5_0": ((0,), _q5_0),
    "Q4_K": ((0, 2), _q4_k),
    "Q4_1": ((0, 2), _q4_1),
    "Q4_0": ((0,), _q4_0),
    "Q3_K": ((108,), _q3_k),
    "Q2_K": ((80, 82), _q2_k),
    "IQ4_NL": ((0,), _iq4_nl),
    "IQ4_XS": ((0,), _iq4_xs),
}
BLOCK_TYPES: Mapping[str, BlockType] = {
    name: BlockType(name, kind.elements, kind.nbytes, *UNPACKERS[name]) for name, kind in PACKED_TYPES.items()
}
