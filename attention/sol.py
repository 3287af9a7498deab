"""comfy-kitchen's Sol attention: blocks of 64 tokens, those that matter exactly and the others by their means.

Its kernels compute in 8 bits. Source: https://arxiv.org/abs/2607.24027; package comfy-kitchen 0.2.40,
`comfy_kitchen/backends/eager/sol_attn.py` (which defines it) and `backends/cuda/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import AttentionWorkspace, BlockChoice
from .kitchen import PACKAGE, kitchen_function
from .packaged import PackagedAttention
from .probe import THIS_MACHINE, KernelNeeds, Machine

NEEDS = KernelNeeds(
    lowest=(8, 0),
    gpus="compute capability 8.0 or newer (RTX 30 series, A100 and later)",
    head_dims=(128,),
)
ALIGNMENT = 8  # elements of a stride; the first one's address is a multiple of 16 bytes
# q, k and v in 8 bits, their means and scales; measured on an H200 at 32,760 and 75,600 tokens, and the fp32 means by
# which a share of the blocks is chosen.
WORKSPACE = AttentionWorkspace(per_query=1.2 + 0.2, per_key=2.4 + 0.2, per_row=1.0)


class SolAttention(PackagedAttention):
    """`comfy_kitchen.sol_attn`; a `SparseBackend`."""

    name = "sol_attn"
    workspace = WORKSPACE
    needs = NEEDS

    def __init__(self, device: torch.device, machine: Machine = THIS_MACHINE) -> None:
        super().__init__(device, machine)
        self._plain: Callable[..., Tensor] | None = None

    def _find(self) -> Callable[..., Tensor]:
        function = kitchen_function(self._machine, self.name)
        self._plain = kitchen_function(self._machine, self.name, f"{PACKAGE}.backends.eager.sol_attn")
        return function

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockChoice) -> Tensor:
        """Attention among `[B, L, H, D]`."""
        q, k, v = (_aligned(tensor) for tensor in (q, k, v))
        return self.function(q, k, v, **_arguments(blocks))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockChoice) -> Tensor:
        """The same by the package's plain PyTorch, in fp32; every token has a score with every other in memory."""
        assert self._plain is not None, "refuse() decides whether reference() may run"
        return self._plain(q.float(), k.float(), v.float(), **_arguments(blocks))


def _arguments(blocks: BlockChoice) -> dict[str, Any]:
    return {
        "tau": blocks.tau,
        "topk_ratio": blocks.top_k,
        "sink_blocks": list(blocks.sinks),
        "sink_q": list(blocks.exact_queries),
    }


def _aligned(tensor: Tensor) -> Tensor:
    """The same as the kernels read it: they load 16 bytes at a time."""
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    if tensor.stride(-1) != 1 or any(stride % ALIGNMENT for stride in strides):
        return tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)
