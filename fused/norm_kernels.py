"""LayerNorm of rows, modulated or affine, as Triton kernels: one program per row."""

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
    col, rest = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    inside = rest < dim
    x_ptr += row.to(tl.int64) * row_stride
    x = tl.load(x_ptr + col).to(tl.float32)
    y = tl.load(x_ptr + rest, mask=inside, other=0.0).to(tl.float32)
    mean = (tl.sum(x, 0) + tl.sum(y, 0)) / dim
    x -= mean
    y = tl.where(inside, y - mean, 0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / dim + eps))
    group = ((first_row + row) // rows_per_group) * group_stride
    scale = tl.load(scale_ptr + group + col).to(tl.float32)
    shift = tl.load(shift_ptr + group + col).to(tl.float32)
    rest_scale = tl.load(scale_ptr + group + rest, mask=inside, other=0.0).to(tl.float32)
    rest_shift = tl.load(shift_ptr + group + rest, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        scale += 1.0
        rest_scale += 1.0
    out_ptr += row.to(tl.int64) * dim
    tl.store(out_ptr + col, x * inverse * scale + shift)
    tl.store(out_ptr + rest, y * inverse * rest_scale + rest_shift, mask=inside)
