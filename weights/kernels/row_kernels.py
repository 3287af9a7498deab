"""The steps over rows of 8-bit numbers as Triton kernels; each element is read once and written once.

Bytes per call: quantise 3 x rows x in, from the 2-byte activations (the second look at a row comes from cache);
dequantise 3 x; rescale 6 x from int32. The floor on a device of bandwidth W is that over W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...system.grids import cdiv, next_power_of_2
from .row_reference import LARGEST, SMALLEST_SCALE

_KINDS = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


def launch_quantize(x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `RowOps.quantize`."""
    rows, dim = x.shape
    values = torch.empty(rows, dim, device=x.device, dtype=dtype) if out is None else out
    scales = torch.empty(rows, 1, device=x.device, dtype=torch.float32)
    _quantize_kernel[(rows,)](
        x, values, scales, dim, x.stride(0), LARGEST[dtype], SMALLEST_SCALE,
        INTEGER=dtype == torch.int8, BLOCK=next_power_of_2(dim), num_warps=8 if dim > 2048 else 4,
    )  # fmt: skip
    return values, scales


def launch_dequantize(values: Tensor, scales: Tensor | None, out: Tensor) -> None:
    """See `RowOps.dequantize`; numbers of one byte."""
    assert values.is_contiguous() and out.is_contiguous()
    rows, dim = values.shape
    block = 4096
    per_row = scales is not None and scales.numel() > 1
    if not per_row and values.numel() % block == 0:  # one scale for all: no row ends within a block
        rows, dim = values.numel() // block, block
    _dequantize_kernel[(rows, cdiv(dim, block))](
        values.view(torch.uint8), out if scales is None else scales, out, dim, int(per_row),
        KIND=_KINDS[values.dtype], SCALED=scales is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def launch_rescale(product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See `RowOps.rescale`."""
    num_rows, dim = product.shape
    block = 2048
    _rescale_kernel[(num_rows, cdiv(dim, block))](
        product, rows, columns, columns if bias is None else bias, out, dim, product.stride(0), out.stride(0),
        BIAS=bias is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scales_ptr, dim, row_stride, largest, smallest_scale,
    INTEGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    x = tl.load(x_ptr + row.to(tl.int64) * row_stride + col, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), largest), smallest_scale)
    x = x * tl.div_rn(1.0, scale)  # a division takes as long as ten products
    x = tl.minimum(tl.maximum(x, -largest), largest)
    if INTEGER:
        # Adding 1.5 x 2^23 leaves no room for a fraction, so the sum is rounded to an integer, halves to even.
        x = (x + 12582912.0) - 12582912.0
    tl.store(scales_ptr + row, scale)
    tl.store(values_ptr + row.to(tl.int64) * dim + col, x.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(
    values_ptr, scales_ptr, out_ptr, dim, per_row, KIND: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < dim
    start = row.to(tl.int64) * dim
    code = tl.load(values_ptr + start + col, mask=inside, other=0)
    x = decode(code, KIND)
    if SCALED:
        x *= tl.load(scales_ptr + row * per_row).to(tl.float32)
    tl.store(out_ptr + start + col, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def decode(code, KIND: tl.constexpr):
    """uint8 codes of int8, e4m3fn or e5m2 -> fp32, by integer steps that every GPU has (casts need 8.9)."""
    if KIND == 0:
        x = code.to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == 1:
        # exponent and mantissa moved to fp16's place; the exponents' biases differ by 8
        bits = code.to(tl.uint16)
        moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = moved.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        x = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _rescale_kernel(
    product_ptr, rows_ptr, columns_ptr, bias_ptr, out_ptr, dim, product_stride, out_stride,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < dim
    x = tl.load(product_ptr + row.to(tl.int64) * product_stride + col, mask=inside, other=0).to(tl.float32)
    x = x * tl.load(rows_ptr + row) * tl.load(columns_ptr + col, mask=inside, other=0.0)
    if BIAS:
        x += tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + col, x.to(out_ptr.dtype.element_ty), mask=inside)
