"""Arithmetic of merging a LoRA into a dense fp32 weight, and of quantising the result again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.row_reference import LARGEST, quantized, row_scales
from ..linear.fp8 import Fp8Dequantized
from ..linear.int8 import Int8Dequantized, rotate, rotation_matrix
from ..linear.weight_format import Plain, WeightFormat
from .file import Difference, Lora, LowRankPair


def merge_pair_(weight: Tensor, lora: Lora, pair: LowRankPair, strength: float) -> None:
    """`weight [out, ...]` fp32 in place."""
    flat = weight.view(weight.shape[0], -1)
    up, down = lora.up(pair).float(), lora.down(pair).float()
    if pair.magnitude is None:
        flat.addmm_(up, down, alpha=pair.scale * strength)
        return
    changed = decomposed(flat.addmm(up, down, alpha=pair.scale), lora.magnitude(pair).float())
    flat.lerp_(changed, strength)


def merge_difference_(weight: Tensor, lora: Lora, difference: Difference, strength: float) -> None:
    """`weight` fp32 in place."""
    weight.add_(lora.difference(difference).float().view(weight.shape), alpha=strength)


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """`weight [out, in]` with rows, or columns, of the lengths `magnitude`. Source: DoRA, arXiv 2402.09353."""
    by_row = magnitude.shape[0] == weight.shape[0]
    lengths = weight.norm(dim=1 if by_row else 0, keepdim=True)
    return weight * (magnitude.reshape(lengths.shape) / lengths.clamp_min(torch.finfo(torch.float32).tiny))


def can_requantize(form: WeightFormat, dtype: torch.dtype) -> bool:
    """Whether a weight of this format and stored dtype can be merged into and stored again."""
    if isinstance(form, Plain):
        return dtype.is_floating_point
    return isinstance(form, Fp8Dequantized | Int8Dequantized)


def requantize(weight: Tensor, form: WeightFormat, dtype: torch.dtype, num_scales: int) -> tuple[Tensor, Tensor | None]:
    """A dense `weight` in a stored form again: its values, and fresh scales (one, or `[out]`) where it has some."""
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
