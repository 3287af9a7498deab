"""How a forward pass runs, as opposed to what it computes: backends, chunk sizes and the buffers they imply."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention.backend import Backend
from ..attention.sdpa import Sdpa
from ..fused.eager import EagerOps
from ..fused.ops import FusedOps
from ..weights.linear.projection import Scratch

TILE_ROWS = 256


@dataclass(frozen=True)
class Execution:
    """Choices that change speed and memory, and results only by rounding.

    `token_chunk` rows go through norms and matrix products at a time; attention runs over `head_groups` groups of
    heads in turn. Both come from the memory plan.
    """

    dtype: torch.dtype = torch.float32
    attention: Backend = field(default_factory=lambda: Sdpa(torch.device("cpu")))
    ops: FusedOps = field(default_factory=EagerOps)
    token_chunk: int = 4096
    head_groups: int = 1


class Workspace:
    """Every token-sized buffer of a pass besides the residual stream: q, k and v.

    The FFN's hidden activations live in the same bytes, for as many rows at a time as fit (`hidden_rows`).
    Rows are tokens of all samples in order: `[batch * tokens, dim]`. Where a model joins attention and FFN in rows of
    `joined_dim`, those live in the bytes of k and v while q is still read (`joined_rows`).
    """

    def __init__(
        self,
        execution: Execution,
        num_rows: int,
        dim: int,
        ffn_dim: int,
        device: torch.device,
        scratch_elements: int,
        joined_dim: int = 0,
    ):
        self.execution = execution
        self.dtype = execution.dtype
        self.num_rows = num_rows
        # short clips of models with a wide FFN: never less than one chunk of hidden rows
        chunk = min(num_rows, execution.token_chunk)
        size = max(3 * num_rows * dim, chunk * ffn_dim, num_rows * dim + chunk * joined_dim)
        self.pool = torch.empty(size, device=device, dtype=execution.dtype)
        self.dim, self.ffn_dim, self.joined_dim = dim, ffn_dim, joined_dim
        self.hidden_rows = min(num_rows, size // ffn_dim)
        self.joined_rows = min(num_rows, (size - num_rows * dim) // joined_dim) if joined_dim else 0
        self.hidden_after_q_rows = min(num_rows, (size - num_rows * dim) // ffn_dim)
        self.scratch = Scratch(device, execution.dtype, scratch_elements)

    @property
    def ops(self) -> FusedOps:
        """The elementwise steps; code that is compiled has them in a form of its own, and no other code sees that."""
        return self.execution.ops.compiled() if torch.compiler.is_compiling() else self.execution.ops

    # Views are made where they are used: torch.compile takes no inputs that share memory and are written to.

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """`[rows, dim]` each."""
        size = self.num_rows * self.dim
        q, k, v = (rows_of(self.pool, first, self.num_rows, self.dim) for first in (0, size, 2 * size))
        return q, k, v

    @property
    def hidden(self) -> Tensor:
        """`[hidden_rows, ffn_dim]`, over the same bytes."""
        return rows_of(self.pool, 0, self.hidden_rows, self.ffn_dim)

    @property
    def joined(self) -> Tensor:
        """`[joined_rows, joined_dim]`, over the bytes of k and v."""
        return rows_of(self.pool, self.num_rows * self.dim, self.joined_rows, self.joined_dim)

    @property
    def hidden_after_q(self) -> Tensor:
        """Hidden activations while q is still read: `[hidden_after_q_rows, ffn_dim]`, over the bytes of k and v."""
        return rows_of(self.pool, self.num_rows * self.dim, self.hidden_after_q_rows, self.ffn_dim)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Row ranges of at most `token_chunk` rows that cover `start .. stop` about evenly."""
        stop = self.num_rows if stop is None else stop
        chunk = self.execution.token_chunk
        count = -(-(stop - start) // chunk)
        # products are computed in tiles of up to 256 rows: a tile that is begun costs as much as a whole one
        step = min(chunk, -(-(stop - start) // count // TILE_ROWS) * TILE_ROWS)
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))

    def attend_over(self, q: Tensor, keys_values: list[tuple[Tensor, Tensor]]) -> None:
        """Replace `q [B, L, H, D]` by the sum of its attention to each (k, v), one group of heads at a time."""
        num_heads = q.shape[2]
        step = -(-num_heads // self.execution.head_groups)
        attend = self.execution.attention.attend
        for first in range(0, num_heads, step):
            heads = slice(first, first + step)
            query = q[:, :, heads]
            first_out, *others = (attend(query, k[:, :, heads], v[:, :, heads]) for k, v in keys_values)
            for other in others:
                first_out.add_(other)
            query.copy_(first_out)


def rows_of(buffer: Tensor, first: int, num_rows: int, dim: int) -> Tensor:
    """`[num_rows, dim]` of a flat buffer, the first in its storage, from element `first` on.

    By strides, because inductor writes to such a view, and to slices of it, where they lie; to a slice of the buffer
    itself it writes by making the whole buffer anew (`_ALWAYS_MUTATING_SCATTER_OPS` in `fx_passes/reinplace.py`).
    """
    return buffer.as_strided((num_rows, dim), (dim, 1), first)


def writable(x: Tensor) -> Tensor:
    """The same tensor as a view that compiled code writes to where it lies; see `rows_of`."""
    return x.as_strided(x.shape, x.stride())
