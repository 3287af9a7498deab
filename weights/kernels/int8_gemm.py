"""An int8 matrix product that scales its sums before it writes them: no int32 result goes through memory.

Source of the scheme (tiles, groups of rows that share the cache): the matrix multiplication tutorial of Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...system.grids import cdiv
from .row_reference import QuantizedRows
from .tile import Tile


def launch_int8(
    rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor, tile: Tile
) -> None:
    """See `gemms.Gemm`."""
    (m, k), n = rows.values.shape, weight.shape[0]
    assert weight.is_contiguous() and rows.values.is_contiguous()
    grid = (cdiv(m, tile.m) * cdiv(n, tile.n),)
    _int8_gemm_kernel[grid](
        rows.values, weight, rows.scales, columns, columns if bias is None else bias, out,
        m, n, out.stride(0),
        BIAS=bias is not None, COLUMNS=k, M=tile.m, N=tile.n, K=tile.k, GROUP=8,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@triton.jit
def _int8_gemm_kernel(
    values_ptr, weight_ptr, rows_ptr, columns_ptr, bias_ptr, out_ptr, m, n, out_stride,
    BIAS: tl.constexpr, COLUMNS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_m = tl.cdiv(m, M)
    per_group = GROUP * tl.cdiv(n, N)
    first_m = (program // per_group) * GROUP
    group = tl.minimum(num_m - first_m, GROUP)
    row = (first_m + (program % per_group) % group) * M + tl.arange(0, M)
    col = ((program % per_group) // group) * N + tl.arange(0, N)
    step = tl.arange(0, K)
    # past the end: some row or column of the matrix again, which is not written
    a_ptr = values_ptr + (row % m).to(tl.int64)[:, None] * COLUMNS + step[None, :]
    b_ptr = weight_ptr + (col % n).to(tl.int64)[None, :] * COLUMNS + step[:, None]
    total = tl.zeros((M, N), dtype=tl.int32)
    for start in range(0, COLUMNS, K):
        if COLUMNS % K == 0:
            a = tl.load(a_ptr)
            b = tl.load(b_ptr)
        else:
            a = tl.load(a_ptr, mask=(step < COLUMNS - start)[None, :], other=0)
            b = tl.load(b_ptr, mask=(step < COLUMNS - start)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        a_ptr += K
        b_ptr += K
    scaled = total.to(tl.float32) * tl.load(rows_ptr + row, mask=row < m, other=0.0)[:, None]
    scaled = scaled * tl.load(columns_ptr + col, mask=col < n, other=0.0)[None, :]
    if BIAS:
        scaled += tl.load(bias_ptr + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    address = out_ptr + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(address, scaled.to(out_ptr.dtype.element_ty), mask=(row < m)[:, None] & (col < n)[None, :])
