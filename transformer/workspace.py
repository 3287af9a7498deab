"""The buffers of a forward pass, and the rows that go through it at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.backend import PassAttention
from ..fused.ops import FusedOps
from ..system.device_errors import is_out_of_memory
from ..system.rounds import even_step, query_step
from ..system.torch_compiler import mark_any_length
from ..system.words import copy_in_words
from ..team.share import Part
from ..weights.linear.projection import Scratch
from .execution import Execution
from .packed_heads import PackedHeads
from .rows import in_steps, num_parts, rows_of

FEWEST_PARTS = 8  # of a pass in code for any size: 32,768 rows at 4096 at a time
ANY_NUMBER = 2**40  # of rows
# fp16 ends at 65,504, which the residual stream of a model trained in bf16 may pass (HunyuanVideo's does). It is read
# through norms alone, which do not see a factor, and a power of two costs no bits.
FP16_RESIDUAL = 2.0**-5

Pair = tuple[Tensor | PackedHeads, Tensor | PackedHeads]  # k and v, [B, L, H, D] each
Arrive = Callable[[nn.Module, int], None]  # a block, and the stage that it goes on with
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # as `Backend.attend`


def all_there(block: nn.Module, stage: int) -> None:
    """All weights of a block are on its device together."""


@dataclass(frozen=True)
class Rows:
    """The tokens of all samples in order, `batch` times as many, and what stands in a row.

    A row is `dim` wide, the FFN's hidden one `ffn_dim`. Where a model joins attention and FFN in one row that is
    `joined_dim` wide.
    """

    count: int
    dim: int
    ffn_dim: int
    num_heads: int
    joined_dim: int = 0
    batch: int = 1


class Workspace:
    """Every token-sized buffer of a pass besides the residual stream: k, v, and q for `query_rows` rows at a time.

    Attention's rows do not depend on each other: where q exists for some rows only, their attention is projected and
    added to the residual stream before the next ones are made (`spans`). The FFN's hidden activations live in the same
    bytes, for as many rows at a time as fit (`hidden_rows`). Where a model joins attention and FFN in rows of
    `joined_dim`, those live in the bytes of k and v while q is still read (`joined_rows`): such a model makes all of q.
    Blocks say by `arrive` which of their stages they go on with. The residual stream holds tokens times
    `residual_scale`, which is 1 but in fp16 (None: by the dtype). Where several cards share the pass, all rows are this
    card's `part` of them, and all of their queries are made: self-attention is the cards' work together.
    """

    def __init__(
        self,
        execution: Execution,
        rows: Rows,
        device: torch.device,
        scratch_elements: int,
        all_queries: bool = False,
        arrive: Arrive = all_there,
        residual_scale: float | None = None,
        part: Part | None = None,
    ):
        self.execution, self.arrive, self.part = execution, arrive, part
        self.dtype = execution.dtype
        if residual_scale is None:
            residual_scale = FP16_RESIDUAL if self.dtype == torch.float16 else 1.0
        self.residual_scale = residual_scale
        self.rows, self.dim = rows, rows.dim
        # compiled code for any size knows the number of rows by a shape: other numbers are constants to it
        self.extent = torch.empty(rows.count, 0, device=device) if execution.any_size and part is None else None
        all_queries = all_queries or execution.all_queries or execution.is_sparse or part is not None
        chunks = None if all_queries else execution.query_chunk
        self.query_chunk = chunks if chunks is not None and rows.count > chunks else None
        self.query_step: int | None = None  # found here: compiled code cannot look for it
        if self.query_chunk is not None and self.extent is None:
            heads = -(-rows.num_heads // execution.head_groups)
            self.query_step = query_step(rows.count // rows.batch, self.query_chunk, heads, execution.processors)
        self.chunk_rows = execution.token_chunk
        if self.extent is not None and num_parts(rows.count, self.chunk_rows, FEWEST_PARTS) <= FEWEST_PARTS:
            self.chunk_rows = ANY_NUMBER  # a constant of the code, and plans of larger videos have larger chunks
        # short clips of models with a wide FFN: never less than one chunk of hidden rows
        chunk = min(self.num_rows, execution.token_chunk)
        queries = self.query_rows * self.dim
        self.packs_keys = execution.packed_keys and not all_queries
        # one byte for each number instead of those of the dtype
        keys_values = -(-2 * self.num_rows * self.dim // (self.dtype.itemsize if self.packs_keys else 1))
        size = max(queries + keys_values, chunk * rows.ffn_dim, queries + chunk * rows.joined_dim)
        self.pool = torch.empty(size, device=device, dtype=execution.dtype)
        self.joined_rows = min(self.num_rows, (size - queries) // rows.joined_dim) if rows.joined_dim else 0
        self.hidden_after_q_rows = min(self.num_rows, (size - queries) // rows.ffn_dim)
        self.scratch = Scratch(device, execution.dtype, scratch_elements)
        self.scales = torch.empty(2, self.num_rows, rows.num_heads, device=device) if self.packs_keys else None
        self.watched: PassAttention | None = None  # self-attention of this pass, where it is not the backend's alone

    def make_room(self) -> bool:
        """Have an allocator of fixed segments keep one for all that blocks have for a moment, piece by piece.

        Where it keeps one for each piece, larger ones do not fit into those, and what is left over is nobody's. False
        where it has none: pieces may still have places, and to ask is dear, as it gives all that is free back first.
        """
        try:
            torch.empty(self.execution.room_bytes, dtype=torch.uint8, device=self.pool.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    @property
    def ops(self) -> FusedOps:
        """The elementwise steps; code that is compiled has them in a form of its own, and no other code sees that."""
        return self.execution.ops.compiled() if torch.compiler.is_compiling() else self.execution.ops

    @property
    def num_rows(self) -> int:
        return self.rows.count if self.extent is None else self.extent.shape[0]

    @property
    def query_rows(self) -> int:
        """Rows whose queries exist at a time."""
        if self.query_chunk is None:
            return self.num_rows
        if self.query_step is not None:
            return self.query_step
        tokens = self.num_rows // self.rows.batch
        return -(-tokens // num_parts(tokens, self.query_chunk))

    @property
    def hidden_rows(self) -> int:
        """Rows of the FFN's hidden activations that there is room for at a time."""
        rows = self.pool.numel() // self.rows.ffn_dim
        return min(self.num_rows, rows) if self.extent is None else rows

    @property
    def streams_queries(self) -> bool:
        """Whether q exists for some rows at a time only."""
        return self.query_chunk is not None

    @property
    def all_there(self) -> bool:
        """Whether blocks have all their stages at once."""
        return self.arrive is all_there

    def eps(self, eps: float) -> float:
        """What a norm of the residual stream adds to the variance, for `eps` beside tokens as they are."""
        return eps * self.residual_scale**2

    def gate(self, gate: Tensor) -> Tensor:
        """The factor of what is added to the residual stream, for `gate` beside tokens as they are."""
        return gate if self.residual_scale == 1 else gate * self.residual_scale

    @property
    def queries_are_free(self) -> bool:
        """Whether attention leaves q's bytes to whoever goes on with it."""
        return self.execution.head_groups == 1 and self.part is None

    @property
    def attends_in_chunks(self) -> bool:
        """Whether rows go through attention to few keys chunk by chunk, with all heads, though heads go in groups.

        Its result is as small as what is normed of them, and need not be copied to its place.
        """
        return self.execution.head_groups > 1 and self.part is None and not torch.compiler.is_compiling()

    @property
    def first_key(self) -> int:
        """The element of the pool that keys begin at; queries begin at 0."""
        return self.query_rows * self.dim

    @property
    def first_value(self) -> int:
        return (self.query_rows + self.num_rows) * self.dim

    # Views are made where they are used: torch.compile takes no inputs that share memory and are written to.

    @property
    def queries(self) -> Tensor:
        """`[query_rows, dim]`, the first of which are those of a span."""
        return rows_of(self.pool, 0, self.query_rows, self.dim)

    @property
    def keys(self) -> Tensor:
        """`[rows, dim]`."""
        return rows_of(self.pool, self.first_key, self.num_rows, self.dim)

    @property
    def values(self) -> Tensor:
        """`[rows, dim]`."""
        return rows_of(self.pool, self.first_value, self.num_rows, self.dim)

    def packed_keys_values(self) -> tuple[PackedHeads, PackedHeads]:
        """k and v in 8 bits, over their bytes."""
        assert self.scales is not None
        rows, size = self.rows, self.num_rows * self.dim
        first = self.query_rows * self.dim * self.dtype.itemsize
        both = self.pool.view(torch.int8)[first : first + 2 * size]
        shape = (rows.batch, self.num_rows // rows.batch, rows.num_heads)
        k, v = (
            PackedHeads(values.view(*shape, -1), scales.view(shape), self.ops, self.dtype)
            for values, scales in zip(both.split(size), self.scales, strict=True)
        )
        return k, v

    @property
    def joined(self) -> Tensor:
        """`[joined_rows, joined_dim]`, over the bytes of k and v."""
        return rows_of(self.pool, self.query_rows * self.dim, self.joined_rows, self.rows.joined_dim)

    @property
    def hidden_after_q(self) -> Tensor:
        """Hidden activations while q is still read: `[hidden_after_q_rows, ffn_dim]`, over the bytes of k and v."""
        return rows_of(self.pool, self.query_rows * self.dim, self.hidden_after_q_rows, self.rows.ffn_dim)

    @property
    def kept_rows(self) -> Tensor | None:
        """`[rows, dim]` that no other of these views has bytes of but `joined`; None where there is no room for it."""
        first = self.query_rows * self.dim + self.num_rows * self.rows.ffn_dim
        apart = first >= self.first_value + self.num_rows * self.dim
        if torch.compiler.is_compiling() or not apart or first + self.num_rows * self.dim > self.pool.numel():
            return None
        return rows_of(self.pool, first, self.num_rows, self.dim)

    def fit_any_size(self, *tensors: Tensor) -> None:
        """Have compiled code that takes these tensors of rows or tokens, and this workspace, fit other sizes too."""
        if self.extent is not None:
            mark_any_length(self.extent, self.pool, *tensors)

    def as_given(self, number: int) -> int | None:
        """What a module is given for a number that varies with the size: compiled code would take it for a constant."""
        return number if self.extent is None else None

    def rows_per_group(self, given: int | None, groups: Tensor) -> int:
        """Rows that a group of `groups [groups, ...]` has: as given, or all groups as many."""
        return self.num_rows // groups.shape[0] if given is None else given

    def rows_at(self, first: int, rows: slice) -> Tensor:
        """`[rows, dim]`, some of those that begin at element `first` of the pool.

        Of the pool itself: of slices of a view that begins at a variable place, inductor gives operators a copy to
        write to.
        """
        return rows_of(self.pool, first + rows.start * self.dim, rows.stop - rows.start, self.dim)

    def rows_at_each(self, firsts: Sequence[int], rows: slice) -> list[Tensor]:
        """`rows_at` of each; no comprehension, whose reference to `rows` makes constants of them in compiled code."""
        found: list[Tensor] = []
        for first in firsts:
            found.append(self.rows_at(first, rows))
        return found

    def hidden_at(self, rows: slice) -> Tensor:
        """`[rows, ffn_dim]`, some of the `hidden_rows` over the same bytes; as `rows_at`."""
        width = self.rows.ffn_dim
        return rows_of(self.pool, rows.start * width, rows.stop - rows.start, width)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Row ranges of at most `token_chunk` rows that cover `start .. stop` about evenly."""
        return self.ranges(start, self.num_rows if stop is None else stop, self.chunk_rows, FEWEST_PARTS)

    def ranges(self, start: int, stop: int, most: int, fewest: int = 1) -> Iterator[slice]:
        """Row ranges of at most `most` rows that cover `start .. stop` about evenly.

        For code of any size a number of parts that is a power of two, at least `fewest`: sizes that have as many share
        their code, as its loops are unrolled.
        """
        if self.extent is None:
            yield from in_steps(start, stop, even_step(stop - start, most))
            return
        count = stop - start
        parts = num_parts(count, most, fewest)
        yield from (slice(start + count * i // parts, start + count * (i + 1) // parts) for i in range(parts))

    def spans(self) -> Iterator[slice]:
        """Row ranges whose queries exist at a time: all rows, or some of one sample's."""
        if self.query_chunk is None:
            yield slice(0, self.num_rows)
            return
        tokens = self.num_rows // self.rows.batch
        for sample in range(self.rows.batch):
            start, stop = sample * tokens, (sample + 1) * tokens
            if self.query_step is not None:
                yield from in_steps(start, stop, self.query_step)
            else:
                yield from self.ranges(start, stop, self.query_chunk)

    def chunks_of_samples(self) -> Iterator[slice]:
        """Row ranges that are chunks of one sample each, of as many rows as queries exist of."""
        tokens, most = self.num_rows // self.rows.batch, min(self.chunk_rows, self.query_rows)
        for sample in range(self.rows.batch):
            yield from self.ranges(sample * tokens, (sample + 1) * tokens, most)

    def chunks_with_queries(self) -> Iterator[tuple[slice, bool]]:
        """`chunks`, and whether their rows are of the first span: its queries exist beside all keys and values."""
        stop = next(self.spans()).stop
        yield from ((rows, True) for rows in self.chunks(0, stop))
        if self.streams_queries:
            yield from ((rows, False) for rows in self.chunks(stop))

    def in_heads(self, rows: Tensor) -> Tensor:
        """`[B, L, H, D]` of rows of all samples."""
        return rows.view(self.rows.batch, -1, self.rows.num_heads, self.dim // self.rows.num_heads)

    @property
    def self_attend(self) -> Attend:
        """Attention of tokens to each other: the backend's, or that of a pass that is sparse or watched."""
        return self.execution.attention.attend if self.watched is None else self.watched.attend

    def attend_tokens(self, q: Tensor, span: slice, keys_values: Pair) -> Tensor:
        """Self-attention of the rows `span`, of queries `q [rows, dim]`, to k and v of all tokens; as `attend_rows`."""
        if self.part is None:
            return self.attend_rows(q, span, [keys_values], self.self_attend)
        k, v = keys_values
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        self.part.attend(self.in_heads(q), k, v, self.self_attend, self.execution.head_groups)
        return q

    def attend_rows(
        self,
        q: Tensor,
        span: slice,
        keys_values: Sequence[Pair],
        attend: Attend | None = None,
        all_heads: bool = False,
    ) -> Tensor:
        """Attention of the rows `span`, whose queries are `q [rows, dim]`, to each (k, v) of all samples, summed.

        `[rows, dim]`: q's bytes where heads go in groups, else, or with `all_heads` at once, a tensor of its own.
        `attend` is the backend's where there is none. Where queries are streamed, or with `all_heads`, the rows are
        one sample's.
        """
        if self.streams_queries or all_heads:
            sample = span.start * self.rows.batch // self.num_rows
            part = slice(sample, sample + 1)
            keys_values = [(samples_of(k, part), samples_of(v, part)) for k, v in keys_values]
        batch, _, num_heads, head_dim = keys_values[0][0].shape
        heads = q.view(batch, -1, num_heads, head_dim)
        attended = self._attend(heads, keys_values, attend) if all_heads else self.attend(heads, keys_values, attend)
        return attended.reshape(-1, num_heads * head_dim)

    def attend(self, q: Tensor, keys_values: Sequence[Pair], attend: Attend | None = None) -> Tensor:
        """The sum of the attention of `q [B, L, H, D]` to each (k, v).

        Where heads go in groups it replaces q, else it is a tensor of its own.
        """
        num_heads, groups = q.shape[2], self.execution.head_groups
        if self.queries_are_free:
            return self._attend(q, keys_values, attend)
        step = -(-num_heads // groups)
        for first in range(0, num_heads, step):
            heads = slice(first, first + step)
            copy_in_words(self._attend(q, keys_values, attend, heads), q[:, :, heads])
        return q

    def _attend(
        self, q: Tensor, keys_values: Sequence[Pair], attend: Attend | None, heads: slice | None = None
    ) -> Tensor:
        if attend is None:  # no `or`: torch.compile takes a method for data
            attend = self.execution.attention.attend
        if heads is not None:
            q = q[:, :, heads]
        first, *others = (attend(q, heads_of(k, heads), heads_of(v, heads)) for k, v in keys_values)
        for other in others:
            first.add_(other)
        return first


def samples_of(x: Tensor | PackedHeads, part: slice) -> Tensor | PackedHeads:
    """`x [B, L, H, D]` of some samples."""
    return x.samples(part) if isinstance(x, PackedHeads) else x[part]


def heads_of(x: Tensor | PackedHeads, part: slice | None) -> Tensor:
    """Some heads of `x [B, L, H, D]`, or all, as attention takes them."""
    if isinstance(x, PackedHeads):
        return x.heads(part or slice(None))
    return x if part is None else x[:, :, part]
