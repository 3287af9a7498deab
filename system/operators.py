"""Whose device kernels are launched on, and what operators of PyTorch's that run Triton kernels have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches kernels, and PyTorch records events, on the current device, which need not be the one meant.

    Where cards reach each other a kernel even runs there, on the wrong card and behind nobody's work.
    """
    there = device.type == "cuda" and torch.backends.cuda.is_built() and torch.cuda.is_available()
    return torch.cuda.device(device) if there else nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches kernels on the current device."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def returns_nothing(*arguments: object) -> None:
    """What an operator in place does to shapes."""
