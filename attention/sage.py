"""SageAttention: int8 (and on newer GPUs fp8) attention; quantised, so it runs only by explicit choice.

Source: Zhang et al., https://arxiv.org/abs/2410.02367; package thu-ml/SageAttention, `sageattention/core.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..system.processors import threads_of
from .backend import KEY_BLOCK, QUANTISED_ERROR, AttentionSpec, AttentionWorkspace, KeyMean
from .probe import (
    THIS_MACHINE,
    KernelMissing,
    KernelNeeds,
    Machine,
    find_disagreement,
    find_function,
    with_last_dim_contiguous,
)
from .sdpa import Sdpa

logger = logging.getLogger(__name__)

_GPUS = "compute capability 8.0 or newer (RTX 30 series, A100 and later)"
NEEDS_1 = KernelNeeds(lowest=(8, 0), gpus=_GPUS, head_dims=(64, 96, 128))
NEEDS_2 = KernelNeeds(lowest=(8, 0), gpus=_GPUS, head_dims=range(1, 129))  # pads to 64 or 128 itself

OWN_COPY = 2.0  # of k


def workspace_on(threads: int, copies_k: bool = False, is_hopper: bool = False) -> AttentionWorkspace:
    """What a call has on a GPU that runs so many threads at a time.

    int8 q and k, and v in 16 bits: fp16, or turned about for the fp8 kernels, which have it in fp8 too. Of k our own
    copy (`copies_k`: for version 1), or one less its mean. Hopper's kernels of version 2 pad v in a copy more. Scales
    are one for every few rows.
    """
    per_key = 1.0 + 2.0 + 2.0 + (1.0 if is_hopper and not copies_k else 0.0)
    mean = KeyMean(threads, OWN_COPY if copies_k else 0.0)
    return AttentionWorkspace(per_query=1.0, per_key=per_key, per_row=1.0, mean=mean)


class SageAttention:
    """`sageattention.sageattn` of PyPI 1.0.6 (Triton) or of a 2.x built from source.

    The Triton kernels (all of 1.0.6) do not mask the keys that fill up the last block of 64: each weighs exp(0) in the
    softmax. As k is smoothed to a mean score of 0, the real keys weigh at least 1 on average (Jensen), so the output
    shrinks by at most padding / (length + padding): 20 % for CLIP's 257 image tokens, 0.02 % for 32,760 video tokens.
    Where the probe sees that, calls that could lose more than a bfloat16 step (1/256) run through sdpa instead.
    """

    name = "sageattn"
    exact = False
    error = QUANTISED_ERROR

    def __init__(self, device: torch.device, machine: Machine = THIS_MACHINE) -> None:
        self._machine = machine
        self._function: Callable[..., Any] | None = None
        self._is_version_1 = False
        self._is_hopper = (machine.capability(device) or (0, 0))[0] == 9
        self._threads = threads_of(device)
        self.workspace = AttentionWorkspace()  # known once `refuse` found the package
        self._sdpa = Sdpa(device, machine)

    def refuse(self, spec: AttentionSpec) -> str | None:
        """The reasons why this machine or package cannot run `spec`, or None."""
        reasons = NEEDS_2.refusals(spec, self._machine)
        if not reasons:
            try:
                self._load()
            except KernelMissing as error:
                return str(error)
            reasons = (NEEDS_1 if self._is_version_1 else NEEDS_2).refusals(spec, self._machine)
        if reasons:
            return "; ".join(reasons)
        return self._check_lengths(spec)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D]."""
        assert self._function is not None, "refuse() decides whether attend() may run"
        if self.workspace.spares(k.shape[1]):
            return self._sdpa.attend(q, k, v)
        q, k, v = with_last_dim_contiguous(q, k, v)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            if self._is_version_1:
                # 1.0.6 subtracts the mean from k in place, so it gets its own copy; without smooth_k it goes black.
                k = k.clone(memory_format=torch.contiguous_format)
                return self._function(q, k, v, tensor_layout="NHD", is_causal=False, smooth_k=True)
            return self._function(q, k, v, tensor_layout="NHD", is_causal=False)

    def _check_lengths(self, spec: AttentionSpec) -> str | None:
        self.workspace = workspace_on(self._threads, self._is_version_1, self._is_hopper)
        reason = find_disagreement(self, spec)
        if reason is None:
            return None
        self._sdpa.refuse(spec)
        self.workspace = replace(self.workspace, spared=self._sdpa.workspace)
        if find_disagreement(self, spec) is not None:
            return reason
        logger.info("sageattn: short k lengths that are no multiple of %d run through sdpa", KEY_BLOCK)
        return None

    def _load(self) -> None:
        package = "sageattention==1.0.6"
        if self._machine.platform == "win32":
            package += " triton-windows"
        install = self._machine.pip_install(package)
        function = find_function(self._machine, "sageattention", "sageattn", install)
        parameters = inspect.signature(function).parameters
        if "tensor_layout" not in parameters or not {"smooth_k", "return_lse"} & set(parameters):
            raise KernelMissing(f"sageattn{tuple(parameters)} is of an unknown version: {install}")
        self._is_version_1 = "smooth_k" in parameters
        self._function = function
