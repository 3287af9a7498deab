"""Keys or values in 8 bits: a quarter of what attention reads in 32, half of what it reads in 16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..fused.ops import FusedOps, Rope


@dataclass(frozen=True)
class PackedHeads:
    """`values [B, L, H, D]` int8, each head of a token with a scale of its own, `scales [B, L, H]` fp32.

    On normal numbers of 128 dimensions the error is 0.6 % (fp8 of one scale: 2.6 %); attention gets them in `dtype`.
    """

    values: Tensor
    scales: Tensor
    ops: FusedOps
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def samples(self, part: slice) -> PackedHeads:
        """Those of some samples."""
        return PackedHeads(self.values[part], self.scales[part], self.ops, self.dtype)

    def heads(self, part: slice) -> Tensor:
        """`[B, L, heads, D]` in `dtype`, in memory of their own."""
        values, scales = self.values[:, :, part], self.scales[:, :, part]
        out = torch.empty(values.shape, dtype=self.dtype, device=values.device)
        for each, scale, unpacked in zip(values, scales, out, strict=True):
            self.ops.unpack_heads(each, scale, unpacked)
        return out

    def fill(self, rows: slice, x: Tensor) -> None:
        """Pack `x [rows, H D]`, those rows of all samples in order."""
        values, scales = self._rows(rows)
        self.ops.pack_heads(x.view(values.shape), values, scales)

    def fill_normed(self, rows: slice, x: Tensor, weight: Tensor, eps: float, rope: Rope) -> None:
        """The same of `x` normed by `weight` and turned by `rope`; `x` may be changed by it."""
        self.ops.pack_normed(x, weight, eps, rope, rows.start, *self._rows(rows))

    def _rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The values `[rows, H, D]` and scales `[rows, H]` of those rows of all samples in order."""
        values = self.values.view(-1, *self.values.shape[2:])[rows]
        return values, self.scales.view(-1, self.scales.shape[2])[rows]
