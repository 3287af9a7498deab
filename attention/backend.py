"""What a model asks of its attention, and what every way to compute it offers, dense or sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..system.reductions import sum_buffer_bytes


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
class KeyMean:
    """The mean of k over its tokens by PyTorch, on a GPU that runs `threads` at a time.

    It is taken before there is anything else of a call but `per_key` bytes for each element of k.
    """

    threads: int
    per_key: float = 0.0

    def nbytes(self, keys: int, heads: int, head_dim: int) -> int:
        """Of `heads` heads of `keys` rows."""
        return int(self.per_key * keys * heads * head_dim) + sum_buffer_bytes(keys, heads * head_dim, self.threads)


@dataclass(frozen=True)
class AttentionWorkspace:
    """What one call has on the device beside q, k, v and its output, in bytes.

    `per_query` for each element of q, `per_key` for each of k (and its twin of v), `per_row` for each row and head of
    q, `per_pair` for each row of q with each of k and head. `mean` comes before these and the output, where it is
    taken. What several heads take is not always so many times what one does. `spared` is of calls that are made by
    exact attention instead, because of how many keys they have (`spares`).
    """

    per_query: float = 0.0
    per_key: float = 0.0
    per_row: float = 4.0  # the sum of its exponentials, or its logarithm, in fp32
    per_pair: float = 0.0
    mean: KeyMean | None = None
    spared: AttentionWorkspace | None = None

    def spares(self, length: int) -> bool:
        """Whether calls with so many keys of a sample are made by exact attention.

        Where what fills up the last block would take more of the softmax than a bfloat16 step (1/256).
        """
        return self.spared is not None and -length % KEY_BLOCK * 256 > length

    def nbytes(self, rows: int, keys: int, heads: int, head_dim: int, length: int = 0) -> int:
        """Of `heads` heads, `rows` rows of q and `keys` of k, of all samples: of `length` keys each, where known."""
        if self.spared is not None and self.spares(length):
            return self.spared.nbytes(rows, keys, heads, head_dim)
        elements = head_dim * (self.per_query * rows + self.per_key * keys)
        nbytes = int(heads * (elements + self.per_row * rows + self.per_pair * rows * keys))
        if self.mean is None:
            return nbytes
        return max(nbytes, self.mean.nbytes(keys, heads, head_dim) - OUTPUT_BYTES * rows * heads * head_dim)

    def beside(self, per_query: float, per_key: float) -> AttentionWorkspace:
        """The same of calls with so many bytes more for each element of q, and of k."""
        query, key = self.per_query + per_query, self.per_key + per_key
        mean = self.mean and replace(self.mean, per_key=self.mean.per_key + per_key)
        spared = self.spared and self.spared.beside(per_query, per_key)
        return replace(self, per_query=query, per_key=key, mean=mean, spared=spared)


OUTPUT_BYTES = 2  # for each element of q
KEY_BLOCK = 64  # keys per step of kernels that fill up the last one
EXACT_WORKSPACE = AttentionWorkspace()

# Relative (Frobenius) error allowed against float32 attention on normal random tensors. bfloat16 rounding alone is
# 2.2e-3; int8 QK is 1.4e-2 and int8 QK with fp8 PV 3.8e-2 (modelled in float32). Black, shifted or unscaled
# results are at 1e-1 and beyond.
EXACT_ERROR = 1e-2
QUANTISED_ERROR = 5e-2


class Backend(Protocol):
    """One way to compute softmax(q kᵀ / √D) v; `exact` means nothing is quantised.

    `error` is the largest relative error on normal random numbers that it may have and still count as right.
    `workspace` is known once `refuse` returned None.
    """

    name: str
    exact: bool
    error: float

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


class PassAttention(Protocol):
    """Self-attention of one pass that is more than a backend's: it knows its layers, and may order tokens."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # as `Backend.attend`, of some heads of the layer

    @property
    def reorders(self) -> bool:
        """Whether tokens, and what is theirs, may come in another order."""
        ...

    def begin_layer(self, layer: int, tokens: Sequence[Tensor], spare: Tensor) -> None:
        """The next layer has its turn. `tokens [rows, ...]` may come in another order, through the bytes of `spare`.

        The first of them is the residual stream.
        """
        ...

    def end(self, tokens: Tensor, spare: Tensor) -> None:
        """All layers are done: the residual stream's tokens come back to their places."""
        ...


BLOCK = 64  # tokens in a row that a sparse backend attends together, or takes as one


@dataclass(frozen=True)
class BlockChoice:
    """Which blocks of keys a block of queries attends exactly: the others count as one mean key each.

    Those whose score for the queries' mean lies more than `tau` deviations over the mean, or, where `top_k` is above 0,
    that share of them with the largest scores; always neighbours, and `sinks`, blocks `[start, end)`. The queries of
    the blocks `exact_queries` attend everything exactly.
    """

    tau: float = 1.0
    top_k: float = 0.0
    sinks: tuple[int, int] = (0, 0)
    exact_queries: tuple[int, int] = (0, 0)


class SparseBackend(Protocol):
    """One way to compute attention of which most is left out.

    Keys, values and queries are of one length. `workspace` is known once `refuse` returned None.
    """

    name: str

    @property
    def workspace(self) -> AttentionWorkspace: ...

    def refuse(self, spec: AttentionSpec) -> str | None:
        """The reason, with its fix, why this backend cannot run `spec`; None when it can."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockChoice) -> Tensor:
        """Attention among `[B, L, H, D]`, any of them strided views; returns `[B, L, H, D]`."""
        ...

    def reference(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockChoice) -> Tensor:
        """The same by the backend's own plain PyTorch, in fp32: what `attend` is compared with, on few tokens."""
        ...
