"""LayerNorm of rows, modulated or affine, as Triton kernels: one program per row.

Bytes per call are 4 x rows x dim, and 3 x where the rows go into 8 bits at once, from 16-bit numbers: normed by one
kernel and quantised by another they are 7 x.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_row"])
def narrow_layer_norm_kernel(
    x_ptr, out_ptr, scale_ptr, shift_ptr, first_row, rows_per_group, group_stride, eps, dim, row_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    x = tl.load(x_ptr + row.to(tl.int64) * row_stride + col, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / dim, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / dim + eps)
    group = ((first_row + row) // rows_per_group) * group_stride
    scale = tl.load(scale_ptr + group + col, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + group + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * dim + col, normed * (1.0 + scale) + shift, mask=inside)


@triton.jit(do_not_specialize=["first_row"])
def layer_norm_kernel(
    x_ptr, out_ptr, scale_ptr, shift_ptr, first_row, rows_per_group, group_stride, eps, dim, row_stride,
    MODULATED: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group = ((first_row + row) // rows_per_group) * group_stride
    x, y = _normed_row(
        x_ptr + row.to(tl.int64) * row_stride, scale_ptr + group, shift_ptr + group, eps, dim, MODULATED, MOST, REST
    )
    out_ptr += row.to(tl.int64) * dim
    rest = MOST + tl.arange(0, REST)
    tl.store(out_ptr + tl.arange(0, MOST), x)
    tl.store(out_ptr + rest, y, mask=rest < dim)


@triton.jit(do_not_specialize=["first_row"])
def layer_norm_in_8_bits_kernel(
    x_ptr, values_ptr, scales_ptr, scale_ptr, shift_ptr, first_row, rows_per_group, group_stride, eps, dim, row_stride,
    largest, smallest_scale,
    MODULATED: tl.constexpr, INTEGER: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The bits that `_quantize_kernel` (weights/kernels/row_kernels.py) makes of what `layer_norm_kernel` makes."""
    row = tl.program_id(0)
    group = ((first_row + row) // rows_per_group) * group_stride
    x, y = _normed_row(
        x_ptr + row.to(tl.int64) * row_stride, scale_ptr + group, shift_ptr + group, eps, dim, MODULATED, MOST, REST
    )
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(y), 0))
    scale = tl.maximum(tl.div_rn(peak, largest), smallest_scale)
    inverse = tl.div_rn(1.0, scale)
    # A thread has `AT_ONCE` numbers of a row in turn, as where it stores them in 16 bits: in 8 it would be given twice
    # as many, and then sums of a row are made in another order, and are other ones.
    col = tl.max_contiguous(tl.arange(0, MOST), AT_ONCE)
    rest = tl.max_contiguous(MOST + tl.arange(0, REST), AT_ONCE)
    values_ptr += row.to(tl.int64) * dim
    kind: tl.constexpr = values_ptr.dtype.element_ty
    tl.store(scales_ptr + row, scale)
    tl.store(values_ptr + col, _in_8_bits(x * inverse, largest, INTEGER).to(kind))
    tl.store(values_ptr + rest, _in_8_bits(y * inverse, largest, INTEGER).to(kind), mask=rest < dim)


@triton.jit
def _normed_row(
    x_ptr, scale_ptr, shift_ptr, eps, dim, MODULATED: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """A row that is normed, fp32: its first `MOST` numbers and the others, of which `REST` have room."""
    col, rest = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    inside = rest < dim
    x = tl.load(x_ptr + col).to(tl.float32)
    y = tl.load(x_ptr + rest, mask=inside, other=0.0).to(tl.float32)
    mean = (tl.sum(x, 0) + tl.sum(y, 0)) / dim
    x -= mean
    y = tl.where(inside, y - mean, 0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / dim + eps))
    scale = tl.load(scale_ptr + col).to(tl.float32)
    shift = tl.load(shift_ptr + col).to(tl.float32)
    rest_scale = tl.load(scale_ptr + rest, mask=inside, other=0.0).to(tl.float32)
    rest_shift = tl.load(shift_ptr + rest, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        scale += 1.0
        rest_scale += 1.0
    return x * inverse * scale + shift, y * inverse * rest_scale + rest_shift


@triton.jit
def _in_8_bits(x, largest, INTEGER: tl.constexpr):
    """Products with the inverse of a row's scale, fp32, as numbers of the kind that is stored."""
    x = tl.minimum(tl.maximum(x, -largest), largest)  # between product and sum, so that these do not become one
    if INTEGER:
        # Adding 1.5 x 2^23 leaves no room for a fraction, so the sum is rounded to an integer, halves to even.
        x = (x + 12582912.0) - 12582912.0
    return x
