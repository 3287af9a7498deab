"""comfy-kitchen's attention of 8-bit numbers: q, k, v and the weights; for every NVIDIA GPU from Turing on.

Source: package comfy-kitchen 0.2.40, `comfy_kitchen/sage_attention.py`, which comes with ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .backend import QUANTISED_ERROR, AttentionWorkspace
from .kitchen import kitchen_function
from .packaged import PackagedAttention
from .probe import KernelNeeds, with_last_dim_contiguous

NEEDS = KernelNeeds(
    lowest=(7, 5),
    gpus="compute capability 7.5 or newer (RTX 20 series and later)",
    head_dims=range(1, 257),
)
# 8-bit q, k and v; scales, one for every four rows of q and sixteen of k
WORKSPACE = AttentionWorkspace(per_query=1.0, per_key=1.0 + 1.0, per_row=1.25)


class Int8Attention(PackagedAttention):
    """`comfy_kitchen.int8_attention`, of unequal lengths too."""

    name = "int8_attention"
    exact = False
    error = QUANTISED_ERROR
    workspace = WORKSPACE
    needs = NEEDS

    def _find(self) -> Callable[..., Tensor]:
        return kitchen_function(self._machine, self.name)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D]; returns a view [B, Lq, H, D]."""
        q, k, v = (tensor.transpose(1, 2) for tensor in with_last_dim_contiguous(q, k, v))
        return self.function(q, k, v).transpose(1, 2)
