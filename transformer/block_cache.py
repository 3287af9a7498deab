"""A pass whose blocks may be skipped: what they added when they last ran is added instead."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, int]  # rows, dim
PROBED_ROWS = 1024  # of a sample, looked at where the first block tells whether the others may be skipped


class BlockCache(Protocol):
    """Says when blocks may be skipped; one for each prompt of a step.

    `residual` is what the blocks added when they last ran, `[rows, dim]`: a pass that runs them sets it at its end. A
    pass that fails has used its bytes and leaves None, so when it is repeated they run again.
    `probes`: the first block always runs, and the signal is what it added.
    """

    residual: Tensor | None

    @property
    def probes(self) -> bool: ...

    def reuse(self, signal: Tensor) -> bool:
        """Whether to add `residual` instead.

        `signal [rows, dim]` is what tells how far this step is from the last; its bytes are overwritten afterwards.
        """
        ...

    def room(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Bytes for the residual of such tokens, on their device or in host memory; those of `residual`."""
        ...


@dataclass(frozen=True)
class WithRoom:
    """A cache and its bytes for a pass's residual."""

    cache: BlockCache
    room: Tensor


def with_room(
    cache: BlockCache | None, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> WithRoom | None:
    """A pass's cache with room for so many tokens, before the pass makes anything else.

    What outlasts the pass would else lie in the midst of what it leaves, where the next one's buffers then do not fit.
    """
    return None if cache is None else WithRoom(cache, cache.room((num_rows, dim), dtype, device))


def run_cached(
    x: Tensor,
    blocks: Generator[None, None, None],
    cached: WithRoom,
    signal: Tensor,
    spare: Tensor,
    batch: int = 1,
    reuse: Callable[[Tensor], bool] | None = None,
    probe: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Take tokens `x [rows, dim]` of `batch` samples through the blocks, each of which runs when `blocks` goes on.

    Or add what they added when they last ran; `spare` are bytes on the device that nobody needs between blocks. A cache
    that `probes` looks at what the first block adds in place of `signal`; `reuse` asks it where others decide too, and
    `probe` takes the rows that it then looks at.
    """
    cache, kept = cached.cache, cached.room
    if cache.probes:
        probe = probe or partial(probed_rows, batch=batch)
        before = probe(x).clone()
        next(blocks)
        signal = probe(x).to(torch.float32, copy=True).sub_(before)
    if (reuse or cache.reuse)(signal) and cache.residual is not None:
        _add_(x, cache.residual, spare)
        blocks.close()
        return
    # one tensor holds what the blocks added last time, then what they start from, then what they added this time
    cache.residual = None
    kept.copy_(x, non_blocking=True)
    for _ in blocks:
        pass
    _subtract_(kept, x, spare)
    cache.residual = kept


def probed_step(num_tokens: int) -> int:
    """One in so many tokens of a sample is looked at."""
    return -(-num_tokens // PROBED_ROWS)


def probed_rows(x: Tensor, batch: int, first: int = 0, step: int | None = None) -> Tensor:
    """Some rows of each sample, evenly: `[B * n, dim]`, from the `first` on."""
    samples = x.view(batch, -1, x.shape[1])
    return samples[:, first :: step or probed_step(samples.shape[1])].flatten(0, 1)


def _add_(x: Tensor, residual: Tensor, spare: Tensor) -> None:
    if residual.device == x.device:
        x.add_(residual)
        return
    for rows, part in _parts(x, spare):
        x[rows].add_(part.copy_(residual[rows], non_blocking=True))


def _subtract_(kept: Tensor, x: Tensor, spare: Tensor) -> None:
    """kept = x - kept."""
    if kept.device == x.device:
        torch.sub(x, kept, out=kept)
        return
    for rows, part in _parts(x, spare):
        part.copy_(kept[rows], non_blocking=True)
        kept[rows].copy_(torch.sub(x[rows], part, out=part), non_blocking=True)


def _parts(x: Tensor, spare: Tensor) -> list[tuple[slice, Tensor]]:
    """Row ranges of x, and for each as many rows of the spare bytes."""
    flat = spare.view(-1).view(x.dtype)
    most = max(1, flat.numel() // x.shape[1])
    ranges = [slice(first, min(first + most, len(x))) for first in range(0, len(x), most)]
    return [(rows, flat[: (rows.stop - rows.start) * x.shape[1]].view(-1, x.shape[1])) for rows in ranges]
