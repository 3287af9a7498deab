"""What blocks added when they last ran, and the room for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MakeRoom = Callable[..., Tensor]  # as torch.empty, by a shape, `dtype` and `device`


class Residual:
    """`residual [rows, dim]` of a prompt's passes: what all `BlockCache`s have (see `transformer/block_cache.py`)."""

    def __init__(self, make_room: MakeRoom) -> None:
        self._make_room = make_room
        self.residual: Tensor | None = None

    def room(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Bytes for the residual, those of the last one where they suit."""
        held = self.residual
        if held is not None and (held.shape, held.dtype) == (shape, dtype):
            return held
        self.residual = None  # before another is made: no plan has room for both
        return self._make_room(shape, dtype=dtype, device=device)
