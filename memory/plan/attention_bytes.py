"""What the planner asks of an attention backend."""

from __future__ import annotations

from typing import Protocol


class AttentionBytes(Protocol):
    """What an attention backend says of its memory; see `attention/backend.py: AttentionWorkspace`."""

    def nbytes(self, rows: int, keys: int, heads: int, head_dim: int, length: int = 0) -> int:
        """Bytes that a call of so many rows of q and of k has beside q, k, v and its output.

        `length` are the keys of one sample, where that is known to be what calls have.
        """
        ...
