"""How a forward pass runs, as opposed to what it computes: backends and how much goes through them at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ..attention.backend import Backend
from ..attention.sdpa import Sdpa
from ..attention.sparse.run import AttentionRun
from ..fused.eager import EagerOps
from ..fused.ops import FusedOps


class PlannedPieces(Protocol):
    """How a plan has a pass go, piece by piece: see `memory/plan/footprint.py: Choice`."""

    @property
    def token_chunk(self) -> int: ...
    @property
    def head_groups(self) -> int: ...
    @property
    def query_chunk(self) -> int | None: ...
    @property
    def packed_keys(self) -> bool: ...


@dataclass(frozen=True)
class Execution:
    """Choices that change speed and memory, and results only by rounding.

    `token_chunk` rows go through norms and matrix products at a time; attention runs over `head_groups` groups of
    heads in turn, for the queries of at most `query_chunk` rows at a time (None: of all), of which so many go together
    as keep a GPU's `processors` busy (see `query_step`). They come from the memory plan, as does whether
    self-attention's keys and values are kept in 8 bits (`packed_keys`), which is not only rounding: a plan does so
    where the user chose to compute in 8 bits. `all_queries` overrules both, for attention that must see all at once,
    whatever a leaner plan says in between; and `room_bytes`, the most that blocks have for a moment, by which
    `Workspace.make_room` asks for memory. With `any_size` compiled code fits videos of any size: row ranges are a
    number of parts, not a number of rows (see `Workspace.ranges`).
    """

    dtype: torch.dtype = torch.float32
    attention: Backend = field(default_factory=lambda: Sdpa(torch.device("cpu")))
    ops: FusedOps = field(default_factory=EagerOps)
    token_chunk: int = 4096
    head_groups: int = 1
    query_chunk: int | None = None
    processors: int | None = None
    packed_keys: bool = False
    all_queries: bool = False
    watch: AttentionRun | None = None
    any_size: bool = False
    room_bytes: int = 0

    def planned(self, choice: PlannedPieces, room_bytes: int = 0) -> Execution:
        """The same with what comes from the memory plan."""
        return replace(
            self,
            token_chunk=choice.token_chunk,
            head_groups=choice.head_groups,
            query_chunk=choice.query_chunk,
            packed_keys=choice.packed_keys,
            room_bytes=room_bytes,
        )

    @property
    def is_sparse(self) -> bool:
        """Whether self-attention may leave out what matters little: then it sees all queries at once."""
        return self.watch is not None and self.watch.sparse is not None
