"""The low-rank update of one layer: all its LoRAs side by side, `y += (x @ down.T * scale) @ up.T`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .linear import Projection

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

    def add_to_product_(self, x: Tensor, y: Tensor) -> None:
        """Add what `x [..., in]` makes of it to the layer's product `y [..., out]`, in place."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        hidden = (x.reshape(-1, x.shape[-1]) @ down.t()).mul_(self.scale)
        y.view(-1, y.shape[-1]).addmm_(hidden, up.t())


class SideBranch:
    """A projection with a low-rank update beside it; for weights that are multiplied as they are stored."""

    def __init__(self, project: Projection, update: LowRank):
        self.project, self.update = project, update
        self.form = f"{project.form}, and as they are"

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.multiply(self.quantize(x), out)

    def quantize(self, x: Tensor) -> tuple[Any, Tensor]:
        return self.project.quantize(x), x

    def multiply(self, rows: tuple[Any, Tensor], out: Tensor | None = None) -> Tensor:
        quantized, x = rows
        y = self.project.multiply(quantized, out)
        self.update.add_to_product_(x, y)
        return y
