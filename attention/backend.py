"""What a model asks of its attention, and what every way to compute it offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """What a model asks of its attention."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, head dim {self.head_dim}, on {self.device}"


class Backend(Protocol):
    """One way to compute softmax(q kᵀ / √D) v; `exact` means nothing is quantised."""

    name: str
    exact: bool

    def refuse(self, spec: AttentionSpec) -> str | None:
        """The reason, with its fix, why this backend cannot run `spec`; None when it can."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D], any of them strided views; returns [B, Lq, H, D].

        Call it only after `refuse` returned None.
        """
        ...
