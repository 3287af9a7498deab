"""Steps over rows of 8-bit numbers: quantising activations, unpacking weights, scaling products.

Every row has one scale, `x[row] ≈ values[row] * scales[row]`; scales are fp32. Weights are `[out, in]`, so that a
row of a weight is an output feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .late_rows import GivenRows, tensor_of

FP8_MAX = 448.0  # of e4m3fn
INT8_MAX = 127.0
LARGEST = {torch.float8_e4m3fn: FP8_MAX, torch.int8: INT8_MAX, torch.float8_e5m2: 57344.0}
SMALLEST_SCALE = 1e-30  # of a row of zeros


@dataclass(frozen=True)
class QuantizedRows:
    """`values [rows, in]`, fp8 or int8, and `scales [rows, 1]`, fp32; shape and dtype are those of what was given."""

    values: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype


class RowOps(Protocol):
    """Arithmetic in fp32, rounded once."""

    @property
    def name(self) -> str: ...

    def quantize(self, x: GivenRows, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x [rows, in]` in `dtype`, int8 or float8_e4m3fn, and scales `[rows, 1]`: largest size / `LARGEST[dtype]`.

        The values, written into `out` where it is given, are products with the inverse of the scale, which is rounded
        to fp32. int8 is rounded halves to even, and is never -128.
        """
        ...

    def quantizes_late(self, dtype: torch.dtype) -> bool:
        """Whether rows that are made late are made in `dtype` at once: they are nowhere as they were."""
        ...

    def dequantize(self, values: Tensor, scales: Tensor | None, out: Tensor) -> Tensor:
        """`values * scales` into `out`; `scales` has one element, or one per row, or there is none: all are 1."""
        ...

    def rescale(self, product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """`product [m, n] * rows [m, 1] * columns [n] + bias [n]` into `out`, which may be `product` itself."""
        ...


class TorchRowOps:
    """The reference; on a GPU it needs several passes and temporaries."""

    name = "torch"

    def quantize(self, x: GivenRows, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = tensor_of(x)
        scales = row_scales(x, LARGEST[dtype])
        values = quantized(x.float(), scales, dtype, by_products=True)
        return values if out is None else out.copy_(values), scales

    def quantizes_late(self, dtype: torch.dtype) -> bool:
        return False

    def dequantize(self, values: Tensor, scales: Tensor | None, out: Tensor) -> Tensor:
        # 8-bit numbers are exact in every dtype that computes; the product is made in fp32 and rounded once
        out.copy_(values)
        return out if scales is None else out.mul_(scales.float().reshape(-1, 1))

    def rescale(self, product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        scaled = product.float() * rows * columns
        return out.copy_(scaled if bias is None else scaled.add_(bias))


def quantized(x: Tensor, scales: Tensor, dtype: torch.dtype, by_products: bool = False) -> Tensor:
    """`x / scales` in `dtype`, one of `LARGEST`; `x` is fp32. `by_products`: times the inverse of each scale."""
    values = x * scales.reciprocal() if by_products else x / scales
    if not dtype.is_floating_point:
        values.round_()
    # clamped: a cast past the largest number is NaN in older torch releases
    return values.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def row_scales(x: Tensor, largest: float) -> Tensor:
    """`[rows, 1]` fp32: what the rows are divided by so that their largest magnitude becomes `largest`."""
    peak = x.abs().amax(dim=-1, keepdim=True).float()
    # by a tensor: on a GPU PyTorch divides by a number as a product with its reciprocal, which rounds otherwise
    return (peak / torch.full_like(peak, largest)).clamp_(min=SMALLEST_SCALE)
