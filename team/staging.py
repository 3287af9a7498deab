"""Copies from card to card by way of RAM, through a fixed ring of pinned pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Large enough for a bus at its full speed; while one piece leaves the ring others are on their way to it.
PIECE_BYTES, NUM_PIECES = 32 << 20, 4

Mark = Any  # a point in the work of a card's stream, which only links understand


class Legs(Protocol):
    """The two halves of the way, each on a stream of its card in the order of the calls; the host waits for neither."""

    def leave(self, piece: Tensor, other: Tensor, after: Sequence[Mark]) -> Mark:
        """Copy another card's bytes to RAM, once all these marks are passed; the mark of its end."""
        ...

    def arrive(self, own: Tensor, piece: Tensor, after: Mark) -> Mark:
        """Copy them from there to this card, once the mark is passed; the mark of its end."""
        ...


class StagedCopies:
    """One card's copies from others. The ring is allocated with the first one, once, whatever is copied.

    A piece is written to again behind the copy that read it, by the devices' own order: hosts are far ahead of them,
    and pinned memory of each copy's own would be as large as all that is on its way.
    """

    def __init__(
        self,
        legs: Legs,
        allocate: Callable[[int], Tensor] | None = None,
        piece_bytes: int = PIECE_BYTES,
        num_pieces: int = NUM_PIECES,
    ) -> None:
        self.legs, self.piece_bytes, self.num_pieces = legs, piece_bytes, num_pieces
        self._allocate = allocate or _pinned
        self._ring: list[Tensor] = []
        self._read: list[Mark | None] = [None] * num_pieces  # what has read each piece last
        self._next = 0

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        """Copy each (own, other's) pair of contiguous tensors of one shape after a mark; the mark of the end."""
        end = after
        for own, other in pairs:
            for mine, theirs in self._cut(own, other):
                end = self._copy_piece(mine, theirs, after)
        return end

    def _copy_piece(self, own: Tensor, other: Tensor, after: Mark) -> Mark:
        if not self._ring:
            with torch.inference_mode(False):  # else it could not be written outside of that
                self._ring = list(self._allocate(self.num_pieces * self.piece_bytes).split(self.piece_bytes))
        place, self._next = self._next, (self._next + 1) % self.num_pieces
        piece, read = self._ring[place][: own.numel()], self._read[place]
        left = self.legs.leave(piece, other, [after] if read is None else [after, read])
        self._read[place] = self.legs.arrive(own, piece, left)
        return self._read[place]

    def _cut(self, own: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Their bytes in pieces."""
        flat = (tensor.view(-1).view(torch.uint8).split(self.piece_bytes) for tensor in (own, other))
        yield from zip(*flat, strict=True)


class CudaLegs:
    """Both halves on streams of our own: of each card that is copied from, and that of the card itself."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._there: dict[torch.device, torch.cuda.Stream] = {}

    def leave(self, piece: Tensor, other: Tensor, after: Sequence[Mark]) -> Mark:
        if other.device not in self._there:
            self._there[other.device] = torch.cuda.Stream(other.device)
        stream = self._there[other.device]
        for mark in after:
            stream.wait_event(mark)
        return _copy(piece, other, stream)

    def arrive(self, own: Tensor, piece: Tensor, after: Mark) -> Mark:
        self._stream.wait_event(after)
        return _copy(own, piece, self._stream)

    @property
    def streams(self) -> Sequence[torch.cuda.Stream]:
        """Those on which bytes leave other cards."""
        return list(self._there.values())


def _copy(out: Tensor, source: Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    with torch.cuda.stream(stream):
        out.copy_(source, non_blocking=True)
        event.record(stream)
    return event


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
