"""The elementwise steps of a diffusion transformer's block.

All work on rows of tokens `[rows, dim]`, so that a model can go through its tokens chunk by chunk; a row's
modulation is that of its group (a whole sample, or one frame where timesteps differ per frame):
`group = (first_row + row) // rows_per_group`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-30  # of a head, or a row, of zeros
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Rope:
    """Rotary angles of every token, fp32 `[tokens, head_dim / 2]` each; rows repeat per sample."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, eq=False)
class NormedRows:
    """LayerNorm of `x [rows, dim]`, which has no bytes yet: made as a tensor, or in 8 bits by the kernel that norms.

    With `rows_per_group` it is a modulated norm by `scale` and `shift [groups, dim]`, without an affine one by weight
    and bias, `[dim]` each. `x` is not to be changed before it is read.
    """

    ops: FusedOps
    x: Tensor
    scale: Tensor
    shift: Tensor
    eps: float
    first_row: int = 0
    rows_per_group: int | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __getitem__(self, rows: slice) -> NormedRows:
        """Some of the rows, which begin at a number that is not negative."""
        first = self.first_row + (rows.start or 0)
        return NormedRows(self.ops, self.x[rows], self.scale, self.shift, self.eps, first, self.rows_per_group)

    def tensor(self) -> Tensor:
        """The rows in the dtype of `x`, made anew by each call."""
        if self.rows_per_group is None:
            return self.ops.affine_norm(self.x, self.scale, self.shift, self.eps)
        return self.ops.modulated_norm(self.x, self.shift, self.scale, self.first_row, self.rows_per_group, self.eps)

    def quantized(self, dtype: torch.dtype, largest: float, smallest_scale: float) -> tuple[Tensor, Tensor]:
        """See `FusedOps.quantize_normed`."""
        return self.ops.quantize_normed(self, dtype, largest, smallest_scale)


class FusedOps(Protocol):
    """Statistics and sums in fp32; results in the dtype of `x`."""

    name: str

    def makes_late_rows(self, dim: int) -> bool:
        """Whether `modulated_rows` and `affine_rows`, of so many numbers each, all are nowhere before they are read."""
        ...

    def compiled(self) -> FusedOps:
        """The same steps in a form that torch.compile can take; see `Workspace.ops`."""
        ...

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
        """LayerNorm(x) * (1 + scale) + shift, in `out` where given; `shift`, `scale` are `[groups, dim]`."""
        ...

    def affine_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """LayerNorm(x) * weight + bias."""
        ...

    def modulated_rows(
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float
    ) -> Tensor | NormedRows:
        """`modulated_norm`, as rows that are made where they are read where that spares a pass over them."""
        ...

    def affine_rows(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | NormedRows:
        """`affine_norm` in the same way."""
        ...

    def quantize_normed(
        self, rows: NormedRows, dtype: torch.dtype, largest: float, smallest_scale: float
    ) -> tuple[Tensor, Tensor]:
        """The rows as `[rows, dim]` in `dtype`, int8 or float8_e4m3fn, and a scale for each, `[rows, 1]` fp32.

        The same bits as of rows that are made as a tensor, and quantised then: the scale is the largest size /
        `largest`, at least `smallest_scale`, and values are products with its inverse, int8 rounded halves to even.
        float8_e4m3fn on GPUs that cast to it (compute capability 8.9).
        """
        ...

    def rms_norm_(self, x: Tensor, weight: Tensor, eps: float, rope: Rope | None, first_row: int) -> None:
        """RMSNorm over the whole row, then rotation of interleaved pairs head by head, in place.

        A `weight` shorter than the row is that of one head: every run of so many elements is normalised by itself.
        """
        ...

    def gelu_(self, x: Tensor) -> None:
        """GELU, tanh approximation, in place."""
        ...

    def pack_heads(self, x: Tensor, values: Tensor, scales: Tensor) -> None:
        """`x [rows, H, D]` in 8 bits: int8 `values [rows, H, D]` and `scales [rows, H]` fp32, largest size / 127.

        Values are products with the inverse of the scale, rounded halves to even.
        """
        ...

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
        """`rms_norm_`, then `pack_heads` of the same rows `x [rows, H D]`, which may be changed by it."""
        ...

    def unpack_heads(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        """`values * scales` of some heads, strided views `[rows, H, D]` and `[rows, H]`, into `out [rows, H, D]`."""
        ...

    def gated_add_(self, x: Tensor, y: Tensor, gate: Tensor, first_row: int, rows_per_group: int) -> None:
        """x += y * gate; `gate` is `[groups, dim]`. In fp16 infinite `y` and sums are fp16's largest numbers."""
        ...
