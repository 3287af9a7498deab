"""Tensors as the widest numbers that GPUs copy at once: a strided copy of those is the same bits in less time.

PyTorch copies what has gaps number by number. Of 2 bytes each that is a third of what memory could do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = torch.complex128  # 16 bytes


def in_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views `[..., n]` of words, where all are of one dtype and their last dimensions of such; else the tensors."""
    dtype = tensors[0].dtype
    for each in tensors:
        if each.dtype != dtype or not _is_of_words(each):
            return tensors
    return tuple([each.view(WORD) for each in tensors])


def copy_in_words(x: Tensor, out: Tensor) -> None:
    """`out = x`, of one shape; another dtype, as foreign functions may return, is converted."""
    if not torch.compiler.is_compiling():  # compiled code has copies of its own
        x, out = in_words(x, out)
    out.copy_(x)


def _is_of_words(tensor: Tensor) -> bool:
    size, (*strides, last) = WORD.itemsize // tensor.element_size(), tensor.stride()
    places = (*strides, tensor.storage_offset(), tensor.shape[-1])
    return last == 1 and math.gcd(*places, size) == size and tensor.numel() > 0
