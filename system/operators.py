"""What operators of PyTorch's that run Triton kernels have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches kernels on the current device."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def returns_nothing(*arguments: object) -> None:
    """What an operator in place does to shapes."""
