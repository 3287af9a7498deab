"""Ranges of rows, and views of the rows of a buffer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def in_steps(start: int, stop: int, step: int) -> Iterator[slice]:
    """`start .. stop`, so many rows at a time."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def num_parts(count: int, most: int, fewest: int = 1) -> int:
    """A power of two: into so many parts `count` rows go, of at most `most` rows each."""
    parts = fewest
    while parts * most < count:
        parts *= 2
    return parts if count >= parts else 1


def within(rows: slice, start: int) -> slice:
    """The same rows of a buffer whose first one is row `start`."""
    return slice(rows.start - start, rows.stop - start)


def rows_of(buffer: Tensor, first: int, num_rows: int, dim: int) -> Tensor:
    """`[num_rows, dim]` of a flat buffer, the first in its storage, from element `first` on.

    By strides, because inductor writes to such a view, and to slices of it, where they lie; to a slice of the buffer
    itself it writes by making the whole buffer anew (`_ALWAYS_MUTATING_SCATTER_OPS` in `fx_passes/reinplace.py`).
    """
    return buffer.as_strided((num_rows, dim), (dim, 1), first)


def writable(x: Tensor) -> Tensor:
    """The same tensor, in compiled code as a view that it writes to where that lies; see `rows_of`."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x
