"""Decoded pieces on their way to host memory, behind the decoding of the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def behind_decoding(pieces: Iterable[Tensor], take: Callable[[Tensor], R]) -> Iterator[R]:
    """What `take` makes of each piece, in order; it runs in a thread while the next piece is made.

    `take` brings a piece to host memory, also into fresh pages, which costs as much as the copy. On a GPU it works on
    a stream of its own, which waits for the piece. One piece more than before is on the device meanwhile.
    """
    with ThreadPoolExecutor(1) as taker:
        made = iter(pieces)
        coming: Future[R] | None = None
        while True:
            try:
                piece = next(made, None)  # this queues the device's work and does not wait for it
            except Exception:  # what was made before the device ran out of memory is not made again
                if coming is not None:
                    yield coming.result()
                raise
            done, coming = coming, _submit(taker, take, piece)
            del piece
            if done is not None:
                yield done.result()
            if coming is None:
                return


def _submit(taker: ThreadPoolExecutor, take: Callable[[Tensor], R], piece: Tensor | None) -> Future[R] | None:
    return None if piece is None else taker.submit(_take, take, piece, _end_of_queue(piece))


def _end_of_queue(piece: Tensor) -> torch.cuda.Event | None:
    if piece.device.type != "cuda":
        return None
    made = torch.cuda.Event()
    made.record(torch.cuda.current_stream(piece.device))
    return made


def _take(take: Callable[[Tensor], R], piece: Tensor, made: torch.cuda.Event | None) -> R:
    with torch.inference_mode():  # a thread has modes of its own
        if made is None:
            return take(piece)
        stream = torch.cuda.Stream(piece.device)
        with torch.cuda.stream(stream):
            stream.wait_event(made)
            taken = take(piece)
        stream.synchronize()  # the piece's memory is free from here on
        return taken
