"""8-bit weights with a scale for each block of them, as DeepSeek, Qwen and musubi-tuner write fp8 files.

`weight [out, in]` is fp8 or int8. `weight_scale` holds a number for each block of rows and columns: `[out / 128, in /
128]` (`weight_scale_inv` in files), or `[out, in / 64, 1]`. Blocks at the end may be smaller. Sources: DeepSeek-V3's
`weight_dequant`, musubi-tuner's `fp8_optimization_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..files.checkpoint import TensorInfo
from .weight_format import WeightFormat

BLOCK_SCALED = "8 bits, scaled in blocks"
PIECE_ELEMENTS = 1 << 22  # unpacked at a time: in fp32 they take four times the weight's bytes


@dataclass(frozen=True)
class BlockScaled(WeightFormat):
    """The weight is unpacked into scratch and multiplied in the compute dtype."""

    name = BLOCK_SCALED

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        weight = packed["weight"]
        num_rows, num_columns = weight.shape
        blocks = blocks_of(packed["weight_scale"].shape)
        assert blocks is not None, "checked where the file's dialect is undone"
        scale = packed["weight_scale"].float().view(blocks)
        rows, columns = (block_size(size, count) or size for size, count in zip(weight.shape, scale.shape, strict=True))
        step = rows * max(1, PIECE_ELEMENTS // (rows * num_columns))
        for first in range(0, num_rows, step):
            part = weight[first : first + step]
            scales = scale[first // rows : -(-(first + len(part)) // rows)]
            wide = scales.repeat_interleave(columns, 1)[:, :num_columns].repeat_interleave(rows, 0)[: len(part)]
            out[first : first + step].copy_(part.float().mul_(wide))
        return out


def blocks_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """How many blocks a scale of this shape has down and across; None where it is none of blocks."""
    if len(shape) == 3 and shape[2] == 1:
        return shape[0], shape[1]
    sizes = shape if len(shape) == 2 else tuple(size for size in shape if size != 1)
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def block_size(size: int, count: int) -> int | None:
    """The side of `count` blocks that cover `size`: a power of two where one does, for the last may be smaller."""
    if not 0 < count <= size:
        return None
    power = 1 << (-(-size // count) - 1).bit_length()
    if -(-size // power) == count:
        return power
    return None if size % count else size // count


def is_block_scaled(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Whether a scale is one of blocks of such a weight."""
    blocks = blocks_of(scale.shape)
    if blocks is None or len(weight.shape) != 2:
        return False
    return all(block_size(size, count) for size, count in zip(weight.shape, blocks, strict=True))


def recognise_block_scaled(weight: TensorInfo) -> BlockScaled | None:
    """The format of such a weight; see `dialects.py` for how files say so."""
    return BlockScaled() if weight.quant == BLOCK_SCALED else None
