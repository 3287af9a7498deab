"""SageAttention 3: attention of 4-bit numbers, for Blackwell.

Source: Zhang et al., https://arxiv.org/abs/2505.11594; package sageattn3 of thu-ml/SageAttention
(`sageattention3_blackwell/sageattn3/api.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..system.processors import threads_of
from .backend import AttentionWorkspace, KeyMean
from .packaged import PackagedAttention
from .probe import THIS_MACHINE, KernelNeeds, Machine, find_function

NEEDS = KernelNeeds(
    lowest=(10, 0),
    gpus="compute capability 10.0 or newer (RTX 50 series, B200)",
    head_dims=(64, 128),
)
SOURCE = '"git+https://github.com/thu-ml/SageAttention.git#subdirectory=sageattention3_blackwell"'
# Of 4-bit q, k, v and weights on normal random numbers, modelled in float32: 1.8e-1. Real scores are less even.
ERROR = 0.25
OWN_COPY = 2.0  # of k, which it changes
# That; q, k and v padded, q less its mean once more; 4 bits and a scale for 16 of each; and the scores of every key
# with the mean of 128 queries, in 16 bits and then in fp32.
WORKSPACE = AttentionWorkspace(
    per_query=2.0 + 2.0 + 0.6, per_key=OWN_COPY + 2.0 + 2.0 + 1.2, per_row=4.0, per_pair=(2.0 + 4.0) / 128
)


class SageAttention3(PackagedAttention):
    """`sageattn3.sageattn3_blackwell`."""

    name = "sageattn_3"
    exact = False
    error = ERROR
    needs = NEEDS

    def __init__(self, device: torch.device, machine: Machine = THIS_MACHINE) -> None:
        super().__init__(device, machine)
        self.workspace = replace(WORKSPACE, mean=KeyMean(threads_of(device), OWN_COPY))

    def _find(self) -> Callable[..., Tensor]:
        install = f"build it with the CUDA toolkit: {self._machine.pip_install(f'--no-build-isolation {SOURCE}')}"
        return find_function(self._machine, "sageattn3", "sageattn3_blackwell", install)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D]; returns a view [B, Lq, H, D]."""
        k = k.clone()  # the package subtracts the mean from k in place
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            return self.function(q, k, v, is_causal=False).transpose(1, 2)
