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


@dataclass(frozen=True)
class AttentionWorkspace:
    """What one call has on the device beside q, k, v and its output, in bytes.

    `per_query` for each element of q, `per_key` for each of k (and its twin of v), `per_row` for each row and head of
    q.
    """

    per_query: float = 0.0
    per_key: float = 0.0
    per_row: float = 4.0  # the sum of its exponentials, or its logarithm, in fp32

    def nbytes(self, rows: int, keys: int, heads: int, head_dim: int) -> int:
        """Of `heads` heads, `rows` rows of q and `keys` of k; of all samples together."""
        elements = head_dim * (self.per_query * rows + self.per_key * keys)
        return int(heads * (elements + self.per_row * rows))


EXACT_WORKSPACE = AttentionWorkspace()


class Backend(Protocol):
    """One way to compute softmax(q kᵀ / √D) v; `exact` means nothing is quantised.

    `workspace` is known once `refuse` returned None.
    """

    name: str
    exact: bool

    @property
    def workspace(self) -> AttentionWorkspace: ...

    def refuse(self, spec: AttentionSpec) -> str | None:
        """The reason, with its fix, why this backend cannot run `spec`; None when it can."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of [B, Lq, H, D] over [B, Lk, H, D], any of them strided views; returns [B, Lq, H, D].

        Call it only after `refuse` returned None.
        """
        ...
