"""Reading on threads ahead of whoever takes what was read, so many bytes at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

AHEAD_BYTES = 32 << 20

T = TypeVar("T")


def read_ahead(
    jobs: Iterable[tuple[int, Callable[[], T]]], threads: Executor, most_bytes: int = AHEAD_BYTES
) -> Generator[T]:
    """What each job, of its size in bytes, reads: in their order.

    Read before it is asked for are at most `most_bytes`, or one job's where that has more. What a job raises is raised
    in its turn.
    """
    pending: deque[tuple[int, Future[T]]] = deque()
    left = iter(jobs)
    following = next(left, None)
    ahead_bytes = 0

    def submit_what_fits() -> None:
        nonlocal following, ahead_bytes
        while following is not None and (not pending or ahead_bytes + following[0] <= most_bytes):
            pending.append((following[0], threads.submit(following[1])))
            ahead_bytes += following[0]
            following = next(left, None)

    try:
        submit_what_fits()
        while pending:
            nbytes, future = pending.popleft()
            made = [future.result()]
            ahead_bytes -= nbytes
            submit_what_fits()  # first: threads read on while this one is used
            del future  # it would hold what it made
            yield made.pop()
    finally:
        for _, future in pending:
            future.cancel()
