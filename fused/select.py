"""The elementwise steps of a diffusion transformer's block, and which implementation runs them.

All work on rows of tokens `[rows, dim]`, so that a model can go through its tokens chunk by chunk; a row's
modulation is that of its group (a whole sample, or one frame where timesteps differ per frame):
`group = (first_row + row) // rows_per_group`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..system.dtypes import half_dtype
from ..system.kernel_choice import Trial, choose, disagreement, loaded, relative_error
from .eager import EagerOps


@dataclass(frozen=True)
class Rope:
    """Rotary angles of every token, fp32 `[tokens, head_dim / 2]` each; rows repeat per sample."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class RowGroups:
    """Which rows share one modulation vector: `rows_per_group` consecutive ones."""

    rows_per_group: int


class FusedOps(Protocol):
    """Statistics and sums in fp32; results in the dtype of `x`."""

    name: str

    def compiled(self) -> FusedOps:
        """The same steps in a form that torch.compile can take; see `Workspace.ops`."""
        ...

    def modulated_norm(
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, groups: RowGroups, eps: float
    ) -> Tensor:
        """LayerNorm(x) * (1 + scale) + shift; `shift`, `scale` are `[groups, dim]`."""
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

    def gated_add_(self, x: Tensor, y: Tensor, gate: Tensor, first_row: int, groups: RowGroups) -> None:
        """x += y * gate; `gate` is `[groups, dim]`."""
        ...


def select_fused_ops(device: torch.device) -> FusedOps:
    """Triton kernels on a GPU where they compile and agree with the eager reference; else eager PyTorch."""
    eager = EagerOps()
    if device.type != "cuda":
        return eager
    trial: Trial[FusedOps] = Trial("elementwise steps", device, lambda ops: _disagreement(ops, eager, device))
    return choose(trial, loaded(trial.what, _triton), eager).best


def _triton() -> Sequence[FusedOps]:
    from .triton_ops import TritonOps

    return (TritonOps(),)


def _disagreement(ops: FusedOps, reference: FusedOps, device: torch.device) -> str | None:
    generator = torch.Generator(device).manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype = half_dtype(device)) -> Tensor:  # noqa: B008 - of this call
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    x, weight, modulation = rand(6, 256), rand(256), rand(2, 256, dtype=torch.float32)
    rope = Rope(rand(6, 64, dtype=torch.float32), rand(6, 64, dtype=torch.float32))
    results = []
    for each in (ops, reference):
        y = each.modulated_norm(x, modulation, modulation, 1, RowGroups(4), 1e-6)
        each.rms_norm_(y, weight, 1e-6, rope, 0)
        each.rms_norm_(y, weight[:128], 1e-6, rope, 2)
        each.rms_norm_(y, weight[:64], 1e-6, None, 0)
        each.gelu_(y)
        each.gated_add_(y, each.affine_norm(x, weight, weight, 1e-6), modulation, 1, RowGroups(4))
        results.append(y)
    return disagreement(relative_error(*results))
