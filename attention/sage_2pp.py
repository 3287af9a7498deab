"""SageAttention 2++: int8 products of q and k, fp8 ones with v that are summed in 16 bits where that is enough.

Source: Zhang et al., https://arxiv.org/abs/2505.21136; package thu-ml/SageAttention 2.2, `sageattention/core.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..system.processors import threads_of
from .backend import QUANTISED_ERROR
from .packaged import PackagedAttention
from .probe import THIS_MACHINE, KernelMissing, KernelNeeds, Machine, find_function, with_last_dim_contiguous
from .sage import workspace_on

FUNCTION = "sageattn_qk_int8_pv_fp8_cuda"
SUMS = "fp32+fp16"  # what makes it 2++; versions before 2.2 do not know it
NEEDS = KernelNeeds(
    lowest=(8, 9),
    gpus="compute capability 8.9 or 12.0 (RTX 40 and 50 series)",
    head_dims=range(1, 129),
    but_not=((9, 0), (10, 0), (10, 3), (11, 0)),
)
SOURCE = '"git+https://github.com/thu-ml/SageAttention.git"'


class SageAttention2pp(PackagedAttention):
    """`sageattention.sageattn_qk_int8_pv_fp8_cuda`, by the sums that version 2.2 brought."""

    name = "sageattn_2pp"
    exact = False
    error = QUANTISED_ERROR
    needs = NEEDS

    def __init__(self, device: torch.device, machine: Machine = THIS_MACHINE) -> None:
        super().__init__(device, machine)
        self.workspace = workspace_on(threads_of(device))
        # newer cards have no kernel that scales each thread's rows by themselves, as the package's own choice knows
        self._granularity = "per_warp" if (machine.capability(device) or (0, 0)) >= (12, 0) else "per_thread"

    def _find(self) -> Callable[..., Tensor]:
        install = f"build version 2.2 with the CUDA toolkit: {self._machine.pip_install(SOURCE)}"
        function = find_function(self._machine, "sageattention", FUNCTION, install)
        sums = inspect.signature(function).parameters.get("pv_accum_dtype")
        if sums is None or sums.default != SUMS:
            raise KernelMissing(f"sageattention is of a version before 2.2, which has no sums in {SUMS}: {install}")
        return function

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D]."""
        q, k, v = with_last_dim_contiguous(q, k, v)
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            return self.function(
                q, k, v, tensor_layout="NHD", is_causal=False, qk_quant_gran=self._granularity, pv_accum_dtype=SUMS
            )
