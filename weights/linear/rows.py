"""Steps over rows of 8-bit numbers: quantising activations, unpacking weights, scaling products.

Every row has one scale, `x[row] ≈ values[row] * scales[row]`; scales are fp32. Weights are `[out, in]`, so that a
row of a weight is an output feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...system.dtypes import half_dtype
from ...system.kernel_choice import Trial, choose, disagreement, loaded, relative_error

FP8_MAX = 448.0  # of e4m3fn
INT8_MAX = 127.0
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

    def quantize_fp8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [rows, in]` as e4m3fn and scales `[rows, 1]` = largest magnitude / 448."""
        ...

    def quantize_int8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [rows, in]` as int8 (-127 ... 127, halves to even) and scales `[rows, 1]` = largest magnitude / 127."""
        ...

    def dequantize(self, values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        """`values * scales` into `out`; `scales` has one element, or one per row."""
        ...

    def rescale(self, product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """`product [m, n] * rows [m, 1] * columns [n] + bias [n]` into `out`, which may be `product` itself."""
        ...


class TorchRowOps:
    """The reference; on a GPU it needs several passes and temporaries."""

    name = "torch"

    def quantize_fp8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = row_scales(x, FP8_MAX)
        # clamped: a cast past the largest number is NaN in older torch releases
        return (x.float() / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales

    def quantize_int8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = row_scales(x, INT8_MAX)
        return (x.float() / scales).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scales

    def dequantize(self, values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        # 8-bit numbers are exact in every dtype that computes; the product is made in fp32 and rounded once
        return out.copy_(values).mul_(scales.float().reshape(-1, 1))

    def rescale(self, product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        scaled = product.float() * rows * columns
        return out.copy_(scaled if bias is None else scaled.add_(bias))


def row_scales(x: Tensor, largest: float) -> Tensor:
    """`[rows, 1]` fp32: what the rows are divided by so that their largest magnitude becomes `largest`."""
    peak = x.abs().amax(dim=-1, keepdim=True).float()
    # by a tensor: on a GPU PyTorch divides by a number as a product with its reciprocal, which rounds otherwise
    return (peak / torch.full_like(peak, largest)).clamp_(min=SMALLEST_SCALE)


def select_row_ops(device: torch.device) -> RowOps:
    """Triton kernels on a GPU where they compile and agree with PyTorch; else PyTorch."""
    reference = TorchRowOps()
    if device.type != "cuda":
        return reference
    trial: Trial[RowOps] = Trial("rows of 8-bit numbers", device, lambda ops: _disagreement(ops, reference, device))
    return choose(trial, loaded(trial.what, lambda: _triton(device)), reference).best


def _triton(device: torch.device) -> Sequence[RowOps]:
    from ..kernels.rows import TritonRowOps

    return (TritonRowOps(fp8=torch.cuda.get_device_capability(device) >= (8, 9)),)


def _disagreement(ops: RowOps, reference: RowOps, device: torch.device) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(6, 192, generator=generator, device=device, dtype=half_dtype(device))
    results = []
    for each in (ops, reference):
        parts = []
        for values, scales in (each.quantize_int8(x), each.quantize_fp8(x)):
            parts.append(each.dequantize(values, scales, torch.empty_like(x)))
            parts.append(each.rescale(x, scales, x[0].float(), x[1], torch.empty_like(x)))
        results.append(torch.cat(parts))
    return disagreement(relative_error(*results))
