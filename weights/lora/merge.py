"""Storing a weight, into which something was merged, in its form again."""

from __future__ import annotations

import math
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


def requantize(weight: Tensor, form: WeightFormat, dtype: torch.dtype, num_scales: int) -> tuple[Tensor, Tensor | None]:
    """A dense `weight` in a stored form again: its values, and fresh scales (one, or `[out]`) where it has some."""
    if isinstance(form, GgufFormat):
        return pack_q8_0(weight), None
    if isinstance(form, Plain):
        largest = LARGEST.get(dtype)
        # a cast past the largest number of fp8 is NaN
        return (weight if largest is None else weight.clamp(-largest, largest)).to(dtype), None
    if isinstance(form, Int8Dequantized) and form.rotation:
        weight = rotate(weight, rotation_matrix(form.rotation, weight.device))
    largest = LARGEST.get(dtype)
    if largest is None:  # 16 bits beside a scale, which they do not need
        return weight.to(dtype), torch.ones(num_scales)
    scales = row_scales(weight, largest)
    if num_scales == 1:
        scales = scales.max().reshape(1, 1)
    return quantized(weight, scales, dtype), scales.flatten()
