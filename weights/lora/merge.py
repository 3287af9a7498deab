"""Storing a weight, into which something was merged, in its form again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..files.checkpoint import TensorInfo
from ..kernels.gguf_reference import BLOCK_TYPES
from ..kernels.row_reference import LARGEST, quantized, row_scales
from ..linear.formats import format_for
from ..linear.fp8 import Fp8Dequantized
from ..linear.gguf import Q8_0, GgufFormat, pack_q8_0
from ..linear.int8 import Int8Dequantized, rotate, rotation_matrix
from ..linear.weight_format import Plain, WeightFormat

PIECE_ELEMENTS = 1 << 21  # of a weight that are stored again at a time


def can_requantize(form: WeightFormat, dtype: torch.dtype) -> bool:
    """Whether a weight of this format and stored dtype can be merged into and stored again."""
    if isinstance(form, Plain):
        return dtype.is_floating_point
    return isinstance(form, Fp8Dequantized | Int8Dequantized)


def stored_after(info: TensorInfo) -> TensorInfo | None:
    """How a tensor is stored once something was merged into it; None where it can not be.

    GGUF's packed types become Q8_0, the most accurate of them: the search for the best values of a smaller one takes
    too long for a model that is being read.
    """
    form = format_for(info)
    if can_requantize(form, info.dtype):
        return info
    if not isinstance(form, GgufFormat) or info.logical_shape is None:
        return None
    rows, columns = info.logical_shape
    block = BLOCK_TYPES[Q8_0]
    if columns % block.elements:
        return None
    shape = rows, columns // block.elements * block.nbytes
    return replace(info, quant=Q8_0, shape=shape, nbytes=math.prod(shape))


def requantize(weight: Tensor, form: WeightFormat, dtype: torch.dtype, num_scales: int, out: Tensor) -> Tensor | None:
    """Store a dense `weight` fp32 in `form` again, as `out`; returns fresh scales (one, or `[out]`) where it has some.

    Some rows at a time, as what is made of them on the way is several times as large. `out` may be `weight` itself.
    """
    largest = LARGEST.get(dtype)
    if isinstance(form, GgufFormat):
        _fill(out, map(pack_q8_0, _pieces(weight)))
        return None
    if isinstance(form, Plain):
        _fill(out, (_cast(rows, dtype, largest) for rows in _pieces(weight)))
        return None
    if isinstance(form, Int8Dequantized) and form.rotation:
        weight = rotate(weight, rotation_matrix(form.rotation, weight.device))
    if largest is None:  # 16 bits beside a scale, which they do not need
        out.copy_(weight)
        return torch.ones(num_scales)
    scales = torch.cat([row_scales(rows, largest) for rows in _pieces(weight)])
    if num_scales == 1:
        scales = scales.max().reshape(1, 1)
    each = scales.expand(len(weight), 1).split(_step(weight))
    _fill(out, (quantized(rows, scale, dtype) for rows, scale in zip(_pieces(weight), each, strict=True)))
    return scales.flatten()


def _fill(out: Tensor, pieces: Iterable[Tensor]) -> None:
    first = 0
    for rows in pieces:
        out.view(out.shape or (1,))[first : first + len(rows)] = rows
        first += len(rows)


def _cast(rows: Tensor, dtype: torch.dtype, largest: float | None) -> Tensor:
    """A cast past the largest number of fp8 is NaN."""
    return (rows if largest is None else rows.clamp(-largest, largest)).to(dtype)


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Some of its rows, or of a tensor that has none its numbers, at a time."""
    return weight.split(_step(weight)) if weight.ndim else (weight.view(1),)


def _step(weight: Tensor) -> int:
    return max(1, PIECE_ELEMENTS // max(1, math.prod(weight.shape[1:])))
