"""PyTorch's own scaled dot product attention: exact, on every device."""

from __future__ import annotations

import inspect
import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backend import EXACT_ERROR, EXACT_WORKSPACE, AttentionSpec
from .probe import THIS_MACHINE, Machine, find_disagreement
from .switches import SWITCHES

logger = logging.getLogger(__name__)

# cuDNN is 1.6x as fast as flash on Hopper (38 against 61 ms for 40 heads x 128 at 32,760 tokens on an H200), and
# whether torch tries it first or last by itself differs from version to version.
CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class Sdpa:
    """`torch.nn.functional.scaled_dot_product_attention`, with cuDNN first from Hopper on."""

    name = "sdpa"
    exact = True
    error = EXACT_ERROR
    workspace = EXACT_WORKSPACE

    def __init__(self, device: torch.device, machine: Machine = THIS_MACHINE) -> None:
        capability = machine.capability(device)
        # Elsewhere torch's own order is right (flash, efficient, math), and leaving its switches alone lets
        # torch.compile cache its graphs (pytorch#194007). Before set_priority, cuDNN could not be put first.
        can_order = "set_priority" in inspect.signature(sdpa_kernel).parameters
        prefers_cudnn = capability is not None and capability >= (9, 0) and can_order
        self.order: list[SDPBackend] | None = list(CUDNN_FIRST) if prefers_cudnn else None

    def refuse(self, spec: AttentionSpec) -> str | None:
        """Never refuses by rule; gives up on cuDNN where its result is wrong or its engine missing."""
        if self.order is not None and (reason := find_disagreement(self, spec)) is not None:
            logger.warning("sdpa: torch's own kernel order is used, because cuDNN first %s", reason)
            self.order = None
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D]; returns a view [B, Lq, H, D]."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, D]
        if self.order is None:
            out = F.scaled_dot_product_attention(q, k, v)
        elif torch.compiler.is_compiling():  # the code has its kernel for good, and knows no locks
            out = self._ordered(q, k, v, self.order)
        else:
            with SWITCHES:
                out = self._ordered(q, k, v, self.order)
        return out.transpose(1, 2)

    def _ordered(self, q: Tensor, k: Tensor, v: Tensor, order: list[SDPBackend]) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)
