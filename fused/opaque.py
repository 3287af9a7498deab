"""The Triton kernels as operators of PyTorch's: torch.compile calls them and does not look into them.

Where it traces such kernels itself it turns those that write to views of one buffer into functions of copies; the code
that torch 2.11 makes of ours so reads or writes outside of them (an illegal memory access).
"""

# No `from __future__ import annotations`: torch.library reads the annotations themselves.

import torch
from torch import Tensor

from ..system.operators import on_device_of, returns_nothing
from .eager import EagerOps
from .ops import FusedOps, NormedRows, Rope


class OpaqueOps:
    """See `FusedOps` for what each step computes. Off the GPU the operators run the eager steps."""

    name = "triton"

    def makes_late_rows(self, dim: int) -> bool:
        return False

    def compiled(self) -> FusedOps:
        return self

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
        made = modulated_norm(x, shift, scale, first_row, rows_per_group, eps)
        return made if out is None else out.copy_(made)

    def affine_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return affine_norm(x, weight, bias, eps)

    def modulated_rows(
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float
    ) -> Tensor:
        return modulated_norm(x, shift, scale, first_row, rows_per_group, eps)

    def affine_rows(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return affine_norm(x, weight, bias, eps)

    def quantize_normed(
        self, rows: NormedRows, dtype: torch.dtype, largest: float, smallest_scale: float
    ) -> tuple[Tensor, Tensor]:
        return _steps_for(rows.x).quantize_normed(rows, dtype, largest, smallest_scale)  # no part of compiled code

    def rms_norm_(self, x: Tensor, weight: Tensor, eps: float, rope: Rope | None, first_row: int) -> None:
        cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
        rms_norm_(x, weight, eps, cos, sin, first_row)

    def gelu_(self, x: Tensor) -> None:
        gelu_(x)

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
        _steps_for(x).pack_normed(x, weight, eps, rope, first_row, values, scales)  # no part of compiled code

    def pack_heads(self, x: Tensor, values: Tensor, scales: Tensor) -> None:
        _steps_for(x).pack_heads(x, values, scales)  # no part of compiled code

    def unpack_heads(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        _steps_for(values).unpack_heads(values, scales, out)

    def gated_add_(self, x: Tensor, y: Tensor, gate: Tensor, first_row: int, rows_per_group: int) -> None:
        gated_add_(x, y, gate, first_row, rows_per_group)


@torch.library.custom_op("lowvram_video::modulated_norm", mutates_args=())
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float) -> Tensor:
    with on_device_of(x):
        return _steps_for(x).modulated_norm(x, shift, scale, first_row, rows_per_group, eps)


@torch.library.custom_op("lowvram_video::affine_norm", mutates_args=())
def affine_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    with on_device_of(x):
        return _steps_for(x).affine_norm(x, weight, bias, eps)


@torch.library.custom_op("lowvram_video::rms_norm_", mutates_args=("x",))
def rms_norm_(x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None, first_row: int) -> None:
    with on_device_of(x):
        _steps_for(x).rms_norm_(x, weight, eps, None if cos is None or sin is None else Rope(cos, sin), first_row)


@torch.library.custom_op("lowvram_video::gelu_", mutates_args=("x",))
def gelu_(x: Tensor) -> None:
    with on_device_of(x):
        _steps_for(x).gelu_(x)


@torch.library.custom_op("lowvram_video::gated_add_", mutates_args=("x",))
def gated_add_(x: Tensor, y: Tensor, gate: Tensor, first_row: int, rows_per_group: int) -> None:
    with on_device_of(x):
        _steps_for(x).gated_add_(x, y, gate, first_row, rows_per_group)


for _operator in (modulated_norm, affine_norm):
    _operator.register_fake(lambda x, *_: x.new_empty(x.shape))
for _operator in (rms_norm_, gelu_, gated_add_):
    _operator.register_fake(returns_nothing)


def _steps_for(x: Tensor) -> FusedOps:
    if not x.is_cuda:
        return EagerOps()
    from .triton_ops import TritonOps

    return TritonOps()
