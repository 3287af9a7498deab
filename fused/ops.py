"""The elementwise steps of a diffusion transformer's block.

All work on rows of tokens `[rows, dim]`, so that a model can go through its tokens chunk by chunk; a row's
modulation is that of its group (a whole sample, or one frame where timesteps differ per frame):
`group = (first_row + row) // rows_per_group`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

SMALLEST_SCALE = 1e-30  # of a head of zeros
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Rope:
    """Rotary angles of every token, fp32 `[tokens, head_dim / 2]` each; rows repeat per sample."""

    cos: Tensor
    sin: Tensor


class FusedOps(Protocol):
    """Statistics and sums in fp32; results in the dtype of `x`."""

    name: str

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
