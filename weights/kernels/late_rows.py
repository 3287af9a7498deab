"""Rows that have no bytes before a product reads them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class LateRows(Protocol):
    """`[rows, in]` that whoever reads them makes: as a tensor, or at once in 8 bits, as `RowOps.quantize` would."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, rows: slice) -> LateRows:
        """Some of them."""
        ...

    def tensor(self) -> Tensor:
        """The rows, made anew by each call."""
        ...

    def quantized(self, dtype: torch.dtype, largest: float, smallest_scale: float) -> tuple[Tensor, Tensor]:
        """Values `[rows, in]` in `dtype` and scales `[rows, 1]`: largest size / `largest`, or `smallest_scale`."""
        ...


GivenRows = Tensor | LateRows  # what a product is given


def tensor_of(rows: GivenRows) -> Tensor:
    """The rows as a tensor: to be called once for all that read them."""
    return rows if isinstance(rows, Tensor) else rows.tensor()
