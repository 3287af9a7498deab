"""The elementwise steps as Triton kernels: one program per row, one read and one write of it.

Bytes per call are 2 x rows x dim x element size (3 x for `gated_add_`); the modulation stays in cache. The floor
on a device of bandwidth W is that over W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..system.grids import cdiv, next_power_of_2
from .norm_kernels import layer_norm_in_8_bits_kernel, layer_norm_kernel, narrow_layer_norm_kernel
from .ops import FP16_MAX, SMALLEST_SCALE, FusedOps, NormedRows, Rope

# Measured on an H200 (`benchmarks/results/norms_h200_2026-11-29.json`): what a multiprocessor has in flight counts, and
# registers that hold nothing take as much of its room as others. Not where rows are narrow, or normed head by head.
NORM_WARPS, NARROW = 4, 2048
HEADS_AT_ONCE, HEADS_WARPS = 8, 2


class TritonOps:
    """See `FusedOps` for what each step computes; `compiled` are the same steps for torch.compile."""

    name = "triton"

    def __init__(self, compiled: FusedOps | None = None) -> None:
        self._compiled = compiled

    def makes_late_rows(self, dim: int) -> bool:
        return dim > NARROW

    def compiled(self) -> FusedOps:
        return self._compiled or self

    def modulated_norm(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        first_row: int,
        rows_per_group: int,
        eps: float,
        out: Tensor | None = None,
    ) -> Tensor:
        rows, dim = x.shape
        out = torch.empty_like(x) if out is None else out  # whole rows, one after the other
        # shift and scale are slices of one [groups, 6, dim] tensor: same strides
        if dim <= NARROW:
            narrow_layer_norm_kernel[(rows,)](
                x, out, scale, shift, first_row, rows_per_group, scale.stride(0), eps, dim, x.stride(0),
                BLOCK=next_power_of_2(dim), num_warps=NORM_WARPS,
            )  # fmt: skip
            return out
        most, rest = _two_parts(dim)
        layer_norm_kernel[(rows,)](
            x, out, scale, shift, first_row, rows_per_group, scale.stride(0), eps, dim, x.stride(0),
            MODULATED=True, MOST=most, REST=rest, num_warps=NORM_WARPS,
        )  # fmt: skip
        return out

    def affine_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows, dim = x.shape
        out = torch.empty_like(x)
        weight, bias = _readable(weight, x), _readable(bias, x)
        most, rest = _two_parts(dim)
        layer_norm_kernel[(rows,)](
            x, out, weight, bias, 0, 1, 0, eps, dim, x.stride(0),
            MODULATED=False, MOST=most, REST=rest, num_warps=NORM_WARPS,
        )  # fmt: skip
        return out

    def modulated_rows(
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float
    ) -> Tensor | NormedRows:
        if not self.makes_late_rows(x.shape[1]) or torch.compiler.is_compiling():
            return self.modulated_norm(x, shift, scale, first_row, rows_per_group, eps)
        return NormedRows(self, x, scale, shift, eps, first_row, rows_per_group)

    def affine_rows(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | NormedRows:
        if torch.compiler.is_compiling():
            return self.affine_norm(x, weight, bias, eps)
        return NormedRows(self, x, weight, bias, eps)

    def quantize_normed(
        self, rows: NormedRows, dtype: torch.dtype, largest: float, smallest_scale: float
    ) -> tuple[Tensor, Tensor]:
        x, modulated = rows.x, rows.rows_per_group is not None
        num_rows, dim = x.shape
        scale, shift = (rows.scale, rows.shift) if modulated else (_readable(t, x) for t in (rows.scale, rows.shift))
        values = torch.empty(num_rows, dim, device=x.device, dtype=dtype)
        scales = torch.empty(num_rows, 1, device=x.device, dtype=torch.float32)
        most, rest = _two_parts(dim)
        layer_norm_in_8_bits_kernel[(num_rows,)](
            x, values, scales, scale, shift, rows.first_row, rows.rows_per_group or 1,
            scale.stride(0) if modulated else 0, rows.eps, dim, x.stride(0), largest, smallest_scale,
            MODULATED=modulated, INTEGER=dtype == torch.int8, MOST=most, REST=rest, AT_ONCE=16 // x.element_size(),
            num_warps=NORM_WARPS,
        )  # fmt: skip
        return values, scales

    def rms_norm_(self, x: Tensor, weight: Tensor, eps: float, rope: Rope | None, first_row: int) -> None:
        rows, dim = x.shape
        weight = _readable(weight, x)
        cos, sin = (rope.cos, rope.sin) if rope is not None else (x, x)
        num_tokens, half = rope.cos.shape if rope is not None else (1, 1)
        run = weight.shape[0]
        if run < dim:
            assert dim % run == 0 and run % 2 == 0 and (rope is None or run == 2 * half)
            _head_norm_kernel[(rows,)](
                x, weight, cos, sin, first_row, num_tokens, eps, dim // run, run, x.stride(0),
                ROTATE=rope is not None, RUNS_BLOCK=next_power_of_2(dim // run),
                HALF_BLOCK=next_power_of_2(run) // 2, num_warps=_num_warps(dim),
            )  # fmt: skip
            return
        most, rest = _two_parts(dim)
        _rms_norm_kernel[(rows,)](
            x, weight, cos, sin, first_row, num_tokens, half, eps, dim, x.stride(0),
            ROTATE=rope is not None, MOST=most, REST=rest, num_warps=NORM_WARPS,
        )  # fmt: skip

    def gelu_(self, x: Tensor) -> None:
        rows, dim = x.shape
        block = 2048
        _gelu_kernel[(rows, cdiv(dim, block))](x, dim, x.stride(0), BLOCK=block, num_warps=4)

    def pack_normed(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        rope: Rope | None,
        first_row: int,
        values: Tensor,
        scales: Tensor,
    ) -> None:
        rows, heads, head_dim = values.shape
        dim = heads * head_dim
        most, rest = _two_parts(dim)
        if weight.shape[0] < dim or next_power_of_2(head_dim) != head_dim or rest < head_dim:
            self.rms_norm_(x, weight, eps, rope, first_row)
            self.pack_heads(x.view(values.shape), values, scales)
            return
        weight = _readable(weight, x)
        cos, sin = (rope.cos, rope.sin) if rope is not None else (x, x)
        num_tokens, half = rope.cos.shape if rope is not None else (1, 1)
        _pack_normed_kernel[(rows,)](
            x, weight, cos, sin, values, scales, first_row, num_tokens, half, eps, dim, x.stride(0),
            values.stride(0), scales.stride(0), SMALLEST_SCALE,
            ROTATE=rope is not None, MOST=most, REST=rest, HEAD=head_dim, num_warps=NORM_WARPS,
        )  # fmt: skip

    def pack_heads(self, x: Tensor, values: Tensor, scales: Tensor) -> None:
        rows, heads, dim = x.shape
        _pack_heads_kernel[(rows, cdiv(heads, HEADS_AT_ONCE))](
            x, values, scales, heads, dim, x.stride(0), values.stride(0), scales.stride(0), SMALLEST_SCALE,
            HEADS=HEADS_AT_ONCE, DIM=next_power_of_2(dim), num_warps=HEADS_WARPS,
        )  # fmt: skip

    def unpack_heads(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        rows, heads, dim = out.shape
        at_once = 8
        _unpack_heads_kernel[(cdiv(rows, at_once), heads)](
            values, scales, out, rows, dim, values.stride(0), scales.stride(0), out.stride(0),
            ROWS=at_once, DIM=next_power_of_2(dim), num_warps=4,
        )  # fmt: skip

    def gated_add_(self, x: Tensor, y: Tensor, gate: Tensor, first_row: int, rows_per_group: int) -> None:
        rows, dim = x.shape
        block = 2048
        _gated_add_kernel[(rows, cdiv(dim, block))](
            x, y, gate, first_row, rows_per_group, gate.stride(0), dim, x.stride(0), y.stride(0), FP16_MAX,
            FP16=x.dtype == torch.float16, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _readable(weight: Tensor, x: Tensor) -> Tensor:
    """Triton cannot read fp8 on GPUs before compute capability 8.9; its numbers are exact in every other dtype."""
    return weight if weight.element_size() > 1 else weight.to(x.dtype)


def _num_warps(dim: int) -> int:
    return 8 if dim > 2048 else 4


def _two_parts(dim: int) -> tuple[int, int]:
    """Powers of two that hold a row one after the other: 5120 is 4096 and 1024, where one power would be 8192."""
    most = next_power_of_2(dim) // 2
    return most, next_power_of_2(dim - most)


@triton.jit(do_not_specialize=["first_row"])
def _rms_norm_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, first_row, num_tokens, half, eps, dim, row_stride,
    ROTATE: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    col, rest = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    x_ptr += row.to(tl.int64) * row_stride
    x, y = _normed_row(
        x_ptr, weight_ptr, cos_ptr, sin_ptr, (first_row + row) % num_tokens, half, eps, dim, ROTATE, MOST, REST
    )
    tl.store(x_ptr + col, x)
    tl.store(x_ptr + rest, y, mask=rest < dim)


@triton.jit(do_not_specialize=["first_row"])
def _pack_normed_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, values_ptr, scales_ptr, first_row, num_tokens, half, eps, dim, row_stride,
    values_stride, scales_stride, smallest_scale,
    ROTATE: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x, y = _normed_row(
        x_ptr + row.to(tl.int64) * row_stride, weight_ptr, cos_ptr, sin_ptr, (first_row + row) % num_tokens, half,
        eps, dim, ROTATE, MOST, REST,
    )  # fmt: skip
    values_ptr += row.to(tl.int64) * values_stride
    scales_ptr += row.to(tl.int64) * scales_stride
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    _store_packed(x.to(dtype), values_ptr, scales_ptr, 0, dim, smallest_scale, MOST, HEAD)
    _store_packed(y.to(dtype), values_ptr, scales_ptr, MOST, dim, smallest_scale, REST, HEAD)


@triton.jit
def _normed_row(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, token, half, eps, dim,
    ROTATE: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A row that is normed and turned, fp32: its first `MOST` numbers and the others, of which `REST` have room."""
    col, rest = tl.arange(0, MOST), MOST + tl.arange(0, REST)
    inside = rest < dim
    x = tl.load(x_ptr + col).to(tl.float32)
    y = tl.load(x_ptr + rest, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / dim + eps))
    x *= inverse * tl.load(weight_ptr + col).to(tl.float32)
    y *= inverse * tl.load(weight_ptr + rest, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        angles = token * half
        x = _turned(x, 0, cos_ptr + angles, sin_ptr + angles, half, dim // 2, MOST // 2)
        y = _turned(y, MOST // 2, cos_ptr + angles, sin_ptr + angles, half, dim // 2, REST // 2)
    return x, y


@triton.jit
def _store_packed(
    x, values_ptr, scales_ptr, first, dim, smallest_scale, SIZE: tl.constexpr, HEAD: tl.constexpr
):  # fmt: skip
    """The numbers of a row from `first` on, whole heads, in 8 bits."""
    head = first // HEAD + tl.arange(0, SIZE // HEAD)
    place = head[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
    inside = head < dim // HEAD
    x, scale = _packed(tl.reshape(x, (SIZE // HEAD, HEAD)).to(tl.float32), smallest_scale)
    tl.store(scales_ptr + head, scale, mask=inside)
    tl.store(values_ptr + place, x, mask=inside[:, None])


@triton.jit
def _packed(x, smallest_scale):
    """Heads `[H, D]` in int8, and their scales `[H]`."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), 127.0), smallest_scale)
    # the product is rounded first: what is between it and the sum keeps the two from becoming one
    x = tl.minimum(tl.maximum(x * tl.div_rn(1.0, scale)[:, None], -127.0), 127.0)
    # Adding 1.5 x 2^23 leaves no room for a fraction: the sum is rounded to an integer, halves to even, which its last
    # bits are. A GPU converts numbers at an eighth of the rate at which it adds them.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8), scale


@triton.jit
def _turned(x, first_pair, cos_ptr, sin_ptr, half, num_pairs, PAIRS: tl.constexpr):
    """Pairs of a row from `first_pair` on, turned by the angle of their place in their head."""
    pair = first_pair + tl.arange(0, PAIRS)
    cos = tl.load(cos_ptr + pair % half, mask=pair < num_pairs, other=0.0)
    sin = tl.load(sin_ptr + pair % half, mask=pair < num_pairs, other=0.0)
    real, imag = tl.split(tl.reshape(x, (PAIRS, 2)))
    return tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (2 * PAIRS,))


@triton.jit(do_not_specialize=["first_row"])
def _head_norm_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, first_row, num_tokens, eps, num_runs, run_size, row_stride,
    ROTATE: tl.constexpr, RUNS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    run = tl.arange(0, RUNS_BLOCK)[:, None]
    col = tl.arange(0, 2 * HALF_BLOCK)[None, :]
    inside = (run < num_runs) & (col < run_size)
    address = x_ptr + row.to(tl.int64) * row_stride + run * run_size + col
    x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < run_size, other=0.0).to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, 1)[:, None] / run_size + eps) * weight
    if ROTATE:
        pair = tl.arange(0, HALF_BLOCK)[None, :]
        half = run_size // 2
        angle = ((first_row + row) % num_tokens) * half + pair
        cos = tl.load(cos_ptr + angle, mask=pair < half, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=pair < half, other=0.0)
        real, imag = tl.split(tl.reshape(x, (RUNS_BLOCK, HALF_BLOCK, 2)))
        x = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (RUNS_BLOCK, 2 * HALF_BLOCK))
    tl.store(address, x, mask=inside)


@triton.jit
def _pack_heads_kernel(
    x_ptr, values_ptr, scales_ptr, num_heads, head_dim, x_stride, values_stride, scales_stride, smallest_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, DIM)
    place = head[:, None] * head_dim + col[None, :]
    inside = (head < num_heads)[:, None] & (col < head_dim)[None, :]
    x = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    x, scale = _packed(x, smallest_scale)
    tl.store(scales_ptr + row * scales_stride + head, scale, mask=head < num_heads)
    tl.store(values_ptr + row * values_stride + place, x, mask=inside)


@triton.jit
def _unpack_heads_kernel(
    values_ptr, scales_ptr, out_ptr, num_rows, head_dim, values_stride, scales_stride, out_stride,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1)
    col = tl.arange(0, DIM)
    inside = (row < num_rows)[:, None] & (col < head_dim)[None, :]
    place = head * head_dim + col[None, :]
    x = tl.load(values_ptr + row[:, None] * values_stride + place, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + row * scales_stride + head, mask=row < num_rows, other=0.0)
    x = x * scale[:, None]
    tl.store(out_ptr + row[:, None] * out_stride + place, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_kernel(x_ptr, dim, row_stride, BLOCK: tl.constexpr):
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    address = x_ptr + tl.program_id(0).to(tl.int64) * row_stride + col
    x = tl.load(address, mask=col < dim, other=0.0).to(tl.float32)
    # tanh(u) = 2 sigmoid(2u) - 1, so 0.5 x (1 + tanh(u)) = x sigmoid(2u)
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tl.store(address, x * tl.sigmoid(2.0 * u), mask=col < dim)


@triton.jit(do_not_specialize=["first_row"])
def _gated_add_kernel(
    x_ptr, y_ptr, gate_ptr, first_row, rows_per_group, group_stride, dim, x_stride, y_stride, largest,
    FP16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < dim
    group = ((first_row + row) // rows_per_group) * group_stride
    address = x_ptr + row.to(tl.int64) * x_stride + col
    x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row.to(tl.int64) * y_stride + col, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + group + col, mask=inside, other=0.0)
    if FP16:
        # what is no number stays none, or nobody would see it: minima and maxima take the other one
        y = tl.where(y == y, tl.minimum(tl.maximum(y, -largest), largest), y)
        x = x + y * gate
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -largest), largest), x)
    else:
        x = x + y * gate
    tl.store(address, x, mask=inside)
