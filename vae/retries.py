"""Work on a device that may run out of memory: done again in another way, or once there is more room."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..system.device_errors import is_out_of_memory
from ..system.host_memory import return_freed_bytes

logger = logging.getLogger(__name__)

W = TypeVar("W")
R = TypeVar("R")
V = TypeVar("V", bound=nn.Module)

MakeRoom = Callable[[], None]


def empty_cache() -> None:
    """Give back what nobody uses any more, cycles included."""
    gc.collect()
    torch.cuda.empty_cache()


def first_fitting(ways: Sequence[W], work: Callable[[W], R], what: str, make_room: MakeRoom = empty_cache) -> R:
    """What `work` makes in the first of `ways` that memory suffices for; `what` is for the log.

    `make_room` is called before another way is tried. The error is raised where it meets the last.
    """
    for attempt in _attempts(ways, what, make_room):
        with attempt:
            return work(attempt.way)
    raise AssertionError("there is always a way")


def once_more(work: Callable[[], R], what: str, make_room: MakeRoom = empty_cache) -> R:
    """What `work` makes; where memory is lacking, room is made and it is done again."""
    return first_fitting(("at once", "with more room"), lambda _: work(), what, make_room)


def pieces_fitting(
    ways: Sequence[W], work: Callable[[W], Iterable[Tensor]], what: str, make_room: MakeRoom = empty_cache
) -> Iterator[Tensor]:
    """As `first_fitting`, for pieces `[t, ...]` that are passed on as they come: another way makes what is missing."""
    num_done = 0
    for attempt in _attempts(ways, what, make_room):
        with attempt:
            num_seen = 0
            for piece in work(attempt.way):
                if num_seen + len(piece) > num_done:
                    yield piece[max(0, num_done - num_seen) :]
                num_seen += len(piece)
                num_done = max(num_done, num_seen)
            return


@contextmanager
def at_work(load: Callable[[], V], make_room: MakeRoom = empty_cache, keep: bool = False) -> Iterator[V]:
    """The network that `load` brings to its device, for as long as it works there; `keep` leaves it in RAM.

    Where the device has no memory left, room is made and it is brought again.
    """
    vae = once_more(load, "loading the VAE", make_room)
    try:
        yield vae
    finally:
        vae.to("cpu" if keep else "meta")
        torch.cuda.empty_cache()
        return_freed_bytes()


class _Attempt(Generic[W]):
    """One way, in a `with` block that an out-of-memory, of the device or of RAM, leaves quietly unless it `is_last`."""

    def __init__(self, way: W, is_last: bool):
        self.way, self.is_last = way, is_last
        self.lacked = ""

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, MemoryError):
            self.lacked = "RAM"
        elif error is not None and is_out_of_memory(error):
            self.lacked = "VRAM"
        return bool(self.lacked) and not self.is_last


def _attempts(ways: Sequence[W], what: str, make_room: MakeRoom) -> Iterator[_Attempt[W]]:
    # Room is made here, after the `with` block: inside, the error's traceback holds what the attempt had.
    for index, way in enumerate(ways):
        attempt = _Attempt(way, index == len(ways) - 1)
        yield attempt
        logger.warning("out of %s while %s %s: next %s", attempt.lacked, what, way, ways[index + 1])
        make_room()
