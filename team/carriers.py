"""In what form heads of some tokens travel between cards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..system.words import copy_in_words, in_words

SCALE = torch.float32
ALIGNMENT = 16  # bytes, of the scales behind the values


class Carrier(Protocol):
    """Tensors are those of one sample. What is sent of k of them is of `[n, k, heads, D]`, in one piece of memory."""

    def load(self, tensors: Sequence[Tensor], heads: slice) -> Tensor:
        """What to send of these heads of tensors `[n, H, D]`, which nobody writes to again."""
        ...

    def room(self, out: Tensor) -> Tensor:
        """Where what comes for `out [n, k, heads, D]` may come to; it is `out` itself where that will do."""
        ...

    def unload(self, room: Tensor, out: Tensor) -> None:
        """Fill `out` by what has come."""
        ...


class AsTheyAre:
    """Bit for bit."""

    def load(self, tensors: Sequence[Tensor], heads: slice) -> Tensor:
        return packed(tensors, heads) if len(tensors) > 1 else tensors[0][:, heads].contiguous().unsqueeze(1)

    def room(self, out: Tensor) -> Tensor:
        return out if out.is_contiguous() else out.new_empty(out.shape)

    def unload(self, room: Tensor, out: Tensor) -> None:
        if room is not out:
            copy_in_words(room, out)


AS_THEY_ARE = AsTheyAre()


class Packer(Protocol):
    """Heads in 8 bits, as `fused/ops.py` has it."""

    def pack_heads(self, x: Tensor, values: Tensor, scales: Tensor) -> None: ...
    def unpack_heads(self, values: Tensor, scales: Tensor, out: Tensor) -> None: ...


class InEightBits:
    """Half of the bytes of 16 bits: each head of a token as int8 with a scale of its own, behind all values.

    The error is that of `transformer/packed_heads.py`: 0.6 % on normal numbers of 128 dimensions.
    """

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def load(self, tensors: Sequence[Tensor], heads: slice) -> Tensor:
        num_heads = len(range(*heads.indices(tensors[0].shape[1])))
        shape = (len(tensors[0]), len(tensors), num_heads, tensors[0].shape[2])
        loaded = _bytes_for(shape, tensors[0].device)
        values, scales = _parts(loaded, shape)
        for index, tensor in enumerate(tensors):
            each = tensor[:, heads]
            if each.stride()[1:] != (each.shape[2], 1):  # heads of a token side by side
                each = each.contiguous()
            self._packer.pack_heads(each, values[:, index], scales[:, index])
        return loaded

    def room(self, out: Tensor) -> Tensor:
        return _bytes_for(out.shape, out.device)

    def unload(self, room: Tensor, out: Tensor) -> None:
        values, scales = _parts(room, out.shape)
        for index in range(out.shape[1]):
            self._packer.unpack_heads(values[:, index], scales[:, index], out[:, index])


def packed(tensors: Sequence[Tensor], heads: slice, out: Tensor | None = None) -> Tensor:
    """Some heads of each tensor `[n, H, D]` side by side: `[n, tensors, heads, D]`, by one kernel."""
    parts = [tensor[:, heads] for tensor in tensors]
    if out is None:
        out = parts[0].new_empty(len(parts[0]), len(parts), *parts[0].shape[1:])
    # that kernel reckons with every dimension for every element
    *rows, whole = in_words(*(part.flatten(1) for part in parts), out.flatten(1))
    torch.cat(rows, 1, out=whole)
    return out


def _values_bytes(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def _bytes_for(shape: Sequence[int], device: torch.device) -> Tensor:
    nbytes = _values_bytes(shape) + math.prod(shape[:-1]) * SCALE.itemsize
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _parts(loaded: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values `[n, k, heads, D]` int8 and scales `[n, k, heads]` fp32, over those bytes."""
    values, scales = loaded[: math.prod(shape)], loaded[_values_bytes(shape) :]
    return values.view(torch.int8).view(*shape), scales.view(SCALE).view(*shape[:-1])
