"""The low-rank update of one layer: all its LoRAs side by side, `y += (x @ down.T * scale) @ up.T`.

Beside a layer it is bound by memory: in 16 bits and for N rows it reads x once more (2 N in bytes) and reads and writes
y (4 N out bytes). For Wan 14B at 832x480x81 (N = 32,760) on an H200 (4 TB/s of its 4.8, 650 TFLOP/s in bf16):

    a layer 5120 -> 5120, rank 64      x 84 us, y 168 us; its 43 GFLOP take 66 us; the product itself 1270 us in fp8
    all layers of a block              x 814 us, y 1629 us: of 40 blocks 98 ms, 3.9 % of a step of 2.48 s
    q, k and v read x once             168 us less per block
    GELU in the pass over y            453 us less per block, at 5120 -> 13824: 73 ms are left, 2.9 %

So products of factors are shared between layers that read the same rows, and nothing else passes over y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.late_rows import GivenRows, tensor_of
from ..kernels.low_rank_reference import LowRankOps
from .projection import Projection

# What a layer's tensors are called, beside its weight.
DOWN, UP, SCALE = "lora_down", "lora_up", "lora_scale"


@dataclass(frozen=True)
class LowRank:
    """`down [R, in]` and `up [out, R]`, the LoRAs of a layer one after the other along R; `scale [R]` fp32.

    `scale` is strength * alpha / rank of the LoRA that a rank belongs to. Strengths are only there, so that another
    strength is other numbers in the same place; 0 adds exact zeros.
    """

    down: Tensor
    up: Tensor
    scale: Tensor

    @staticmethod
    def take_from(packed: dict[str, Tensor]) -> LowRank | None:
        """The update among a layer's tensors, removed from them; None for a layer without LoRA."""
        if DOWN not in packed:
            return None
        return LowRank(packed.pop(DOWN), packed.pop(UP), packed.pop(SCALE))

    def add_to_weight_(self, weight: Tensor) -> None:
        """Fold into a dense weight `[out, in]`, in place."""
        weight.addmm_((self.up * self.scale).to(weight.dtype), self.down.to(weight.dtype))


class SideBranch(Projection):
    """A projection with a low-rank update beside it; for weights that are multiplied as they are stored."""

    def __init__(self, project: Projection, update: LowRank, ops: LowRankOps):
        self.project, self.update, self.ops = project, update, ops
        self.form = f"{project.form}, and as they are"

    def quantize(self, x: GivenRows) -> tuple[Any, Tensor]:
        x = tensor_of(x)
        return self.project.quantize(x), x

    def multiply(self, rows: tuple[Any, Tensor], out: Tensor | None = None) -> Tensor:
        quantized, x = rows
        (hidden,) = hidden_of([self], x)
        y = self.project.multiply(quantized, out)
        self.add_up_(y, hidden)
        return y

    def add_up_(self, y: Tensor, hidden: Tensor) -> None:
        """Add what `hidden [rows, R]` makes to the product `y [..., out]`."""
        self.ops.add_up_(y.view(-1, y.shape[-1]), hidden, self.update.up.to(y.dtype))

    def project_gelu(self, x: GivenRows, out: Tensor, gelu_: Callable[[Tensor], None]) -> None:
        """Write GELU of the layer's product into `out`."""
        x = tensor_of(x)
        (hidden,) = hidden_of([self], x)
        self.project(x, out=out)
        self.ops.add_up_(out.view(-1, out.shape[-1]), hidden, self.update.up.to(out.dtype), gelu_)


def hidden_of(branches: Sequence[SideBranch], x: Tensor) -> tuple[Tensor, ...]:
    """`hidden [rows, R]` of every branch that reads `x [..., in]`, which is read once."""
    if not branches:
        return ()
    updates = [branch.update for branch in branches]
    if len(updates) == 1:
        down, scale = updates[0].down, updates[0].scale
    else:
        down, scale = torch.cat([u.down for u in updates]), torch.cat([u.scale for u in updates])
    hidden = branches[0].ops.project_down(x.reshape(-1, x.shape[-1]), down.to(x.dtype), scale)
    return hidden.split([update.down.shape[0] for update in updates], dim=1)
