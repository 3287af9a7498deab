"""What a model asks of its attention, and what every way to compute it offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """What a model asks of its attention; `masked` when it will pass a mask in any call."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    masked: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, head dim {self.head_dim}{', masked' if self.masked else ''}, on {self.device}"


class Backend(Protocol):
    """One way to compute softmax(q kᵀ / √D + mask) v; `exact` means nothing is quantised."""

    name: str
    exact: bool

    def refuse(self, spec: AttentionSpec) -> str | None:
        """The reason, with its fix, why this backend cannot run `spec`; None when it can."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D], any of them strided views; returns [B, Lq, H, D].

        `mask` broadcasts to [B, H, Lq, Lk]: boolean (True = attend) or additive. A backend that takes none raises
        ValueError. Call it only after `refuse` returned None.
        """
        ...
