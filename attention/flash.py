"""FlashAttention 2 and 3: exact, CUDA only.

Source: Dao, https://arxiv.org/abs/2307.08691; Shah et al., https://arxiv.org/abs/2407.08608; package
Dao-AILab/flash-attention (3 is its `hopper` folder).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .backend import EXACT_ERROR, EXACT_WORKSPACE
from .packaged import PackagedAttention
from .probe import KernelNeeds, find_function


class _FlashAttention(PackagedAttention):
    name: str
    exact = True
    error = EXACT_ERROR
    workspace = EXACT_WORKSPACE
    module: str

    def _find(self) -> Callable[..., Any]:
        return find_function(self._machine, self.module, "flash_attn_func", self._how_to_install())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D]."""
        out = self.function(q, k, v, causal=False)
        return out[0] if isinstance(out, tuple) else out  # early versions of 3 return the log-sum-exp, too

    @abstractmethod
    def _how_to_install(self) -> str: ...


class FlashAttention2(_FlashAttention):
    """`flash_attn.flash_attn_func`, for Ampere and later."""

    name = "flash_attn_2"
    module = "flash_attn"
    needs = KernelNeeds(
        lowest=(8, 0),
        gpus="compute capability 8.0 or newer (RTX 30 series, A100 and later)",
        head_dims=range(1, 257),
    )

    def _how_to_install(self) -> str:
        if self._machine.platform == "win32":
            return (
                "no official Windows wheel exists; sdpa runs the same algorithm, so set attention_mode to sdpa, or "
                f"build it with the CUDA toolkit: {self._machine.pip_install('flash-attn --no-build-isolation')}"
            )
        return self._machine.pip_install("flash-attn --no-build-isolation")


class FlashAttention3(_FlashAttention):
    """`flash_attn_interface.flash_attn_func`, for Hopper only."""

    name = "flash_attn_3"
    module = "flash_attn_interface"
    needs = KernelNeeds(
        lowest=(9, 0),
        highest=(9, 0),
        gpus="compute capability 9.0 (H100, H200)",
        head_dims=range(1, 257),
    )

    def _how_to_install(self) -> str:
        source = '"git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper"'
        return f"build it with the CUDA toolkit: {self._machine.pip_install(f'--no-build-isolation {source}')}"
