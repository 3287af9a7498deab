"""The two products of a low-rank update as Triton kernels.

Bytes per call in 16 bits: 2 x rows x in to read x, 4 x rows x out to read and write y. The floor on a device of
bandwidth W is that over W. Rows go from the last to the first: the step before went through them front to back, so the
last ones are still in the L2 cache, and the first ones are when the next step begins (half a chunk of 8192 x 5120).
"""

# No `from __future__ import annotations`: torch.library reads the annotations themselves.
from dataclasses import dataclass
from typing import Sequence  # noqa: UP035 - torch 2.4 knows no other, nor list[int]

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...system.grids import cdiv
from ...system.operators import returns_nothing
from .low_rank_reference import TORCH, Gelu
from .tile import Tile

# Which is fastest depends on the rank and the GPU. m: rows, n: of R, then of out; k: of in, then of R.
DOWN_TILES = (Tile(64, 64, 128, 4, 4), Tile(64, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3))
UP_TILES = (Tile(128, 128, 64, 8, 2), Tile(64, 256, 64, 8, 2), Tile(64, 128, 64, 4, 2))


@dataclass(frozen=True)
class TritonLowRankOps:
    """See `LowRankOps` for what each step computes. Numbers of other dtypes than 16-bit ones go to PyTorch."""

    down: Tile
    up: Tile

    @property
    def name(self) -> str:
        return f"Triton {self.down} and {self.up}"

    def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
        if not _suit(x, down):
            return TORCH.project_down(x, down, scale)
        project_down = low_rank_down if torch.compiler.is_compiling() else launch_down
        return project_down(x, down, scale, self.down)

    def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: Gelu | None = None) -> None:
        if not _suit(y, hidden, up):
            TORCH.add_up_(y, hidden, up, gelu_)
            return
        add_up_ = low_rank_up_ if torch.compiler.is_compiling() else launch_up_
        add_up_(y, hidden, up, gelu_ is not None, self.up)


CANDIDATES = tuple(TritonLowRankOps(down, up) for down, up in zip(DOWN_TILES, UP_TILES, strict=True))


def _suit(*matrices: Tensor) -> bool:
    """One 16-bit dtype (fp32 would be multiplied as tf32), rows without gaps."""
    dtypes = {matrix.dtype for matrix in matrices}
    return dtypes in ({torch.bfloat16}, {torch.float16}) and all(matrix.stride(1) == 1 for matrix in matrices)


def launch_down(x: Tensor, down: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    """`hidden [rows, R]`."""
    (rows, columns), rank = x.shape, down.shape[0]
    hidden = torch.empty(rows, rank, device=x.device, dtype=x.dtype)
    _down_kernel[(cdiv(rank, tile.n), cdiv(rows, tile.m))](
        x, down, scale, hidden, rows, rank, columns, x.stride(0), down.stride(0),
        STEPS=cdiv(columns, tile.k), EVEN=columns % tile.k == 0,
        M=tile.m, N=tile.n, K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return hidden


def launch_up_(y: Tensor, hidden: Tensor, up: Tensor, gelu: bool, tile: Tile) -> None:
    """Add to `y [rows, out]`."""
    (rows, columns), rank = y.shape, up.shape[1]
    _up_kernel[(cdiv(columns, tile.n), cdiv(rows, tile.m))](
        y, hidden, up, rows, rank, columns, y.stride(0), hidden.stride(0), up.stride(0),
        STEPS=cdiv(rank, tile.k), EVEN=rank % tile.k == 0, GELU=gelu,
        M=tile.m, N=tile.n, K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


# Operators for torch.compile, which calls them and does not look into them: traced, a kernel that writes to a view of a
# larger buffer becomes a function of a copy of that buffer. Calling a kernel by itself is faster otherwise. `sizes` are
# a `Tile`.


@torch.library.custom_op("lowvram_video::low_rank_down", mutates_args=())
def low_rank_down(x: Tensor, down: Tensor, scale: Tensor, sizes: Sequence[int]) -> Tensor:
    return launch_down(x, down, scale, Tile(*sizes))


@low_rank_down.register_fake
def _(x: Tensor, down: Tensor, scale: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("lowvram_video::low_rank_up_", mutates_args=("y",))
def low_rank_up_(y: Tensor, hidden: Tensor, up: Tensor, gelu: bool, sizes: Sequence[int]) -> None:
    launch_up_(y, hidden, up, gelu, Tile(*sizes))


low_rank_up_.register_fake(returns_nothing)


@triton.jit
def _down_kernel(
    x_ptr, down_ptr, scale_ptr, hidden_ptr, num_rows, rank, columns, x_stride, down_stride,
    STEPS: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * M + tl.arange(0, M)
    col = tl.program_id(0) * N + tl.arange(0, N)
    step = tl.arange(0, K)
    # past the end: some row of the matrix again, which is not written
    a_ptr = x_ptr + (row % num_rows).to(tl.int64)[:, None] * x_stride + step[None, :]
    b_ptr = down_ptr + (col % rank).to(tl.int64)[None, :] * down_stride + step[:, None]
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, STEPS * K, K):
        if EVEN:
            a = tl.load(a_ptr)
            b = tl.load(b_ptr)
        else:
            a = tl.load(a_ptr, mask=(step < columns - start)[None, :], other=0.0)
            b = tl.load(b_ptr, mask=(step < columns - start)[:, None], other=0.0)
        total = tl.dot(a, b, total)
        a_ptr += K
        b_ptr += K
    total = total * tl.load(scale_ptr + col, mask=col < rank, other=0.0)[None, :]
    address = hidden_ptr + row.to(tl.int64)[:, None] * rank + col[None, :]
    tl.store(address, total.to(hidden_ptr.dtype.element_ty), mask=(row < num_rows)[:, None] & (col < rank)[None, :])


@triton.jit
def _up_kernel(
    y_ptr, hidden_ptr, up_ptr, num_rows, rank, columns, y_stride, hidden_stride, up_stride,
    STEPS: tl.constexpr, EVEN: tl.constexpr, GELU: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * M + tl.arange(0, M)
    col = tl.program_id(0) * N + tl.arange(0, N)
    step = tl.arange(0, K)
    inside = (row < num_rows)[:, None] & (col < columns)[None, :]
    address = y_ptr + row.to(tl.int64)[:, None] * y_stride + col[None, :]
    y = tl.load(address, mask=inside, other=0.0)  # on its way while the factors are multiplied
    a_ptr = hidden_ptr + (row % num_rows).to(tl.int64)[:, None] * hidden_stride + step[None, :]
    b_ptr = up_ptr + (col % columns).to(tl.int64)[None, :] * up_stride + step[:, None]
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, STEPS * K, K):
        if EVEN:
            a = tl.load(a_ptr)
            b = tl.load(b_ptr)
        else:
            a = tl.load(a_ptr, mask=(step < rank - start)[None, :], other=0.0)
            b = tl.load(b_ptr, mask=(step < rank - start)[:, None], other=0.0)
        total = tl.dot(a, b, total)
        a_ptr += K
        b_ptr += K
    x = y.to(tl.float32) + total
    if GELU:
        # step by step as in fused/triton_ops.py: a strength of 0 changes no bit
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2.0 * u)
    tl.store(address, x.to(y_ptr.dtype.element_ty), mask=inside)
