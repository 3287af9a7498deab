"""Buffers that are filled ahead: what a slow read of an abandoned filling must not do."""

import threading
from collections.abc import Sequence

from lowvram_video.memory.stream.staging import Job, Staging
from torch import Tensor


class SlowFirst:
    """Fills a buffer with its block's number; reads of `slow` blocks wait for `go` first."""

    def __init__(self, slow: int) -> None:
        self.slow, self.go, self.under_way = slow, threading.Event(), threading.Event()

    def __call__(self, block: int, buffer: Tensor) -> Sequence[Job]:
        def read() -> None:
            if block == self.slow:
                self.under_way.set()
                assert self.go.wait(30)
            buffer.fill_(block)

        return [read]


def test_a_read_that_was_given_up_never_writes_over_a_newer_one() -> None:
    """Given up twice: the second filling is called back before it has waited for the first."""
    fill = SlowFirst(slow=0)
    staging = Staging(range(8), 64, fill, None, num_buffers=2, num_threads=2)
    try:
        staging.start()
        assert fill.under_way.wait(30)
        staging._seek(3)
        staging._seek(6)
        threading.Timer(0.3, fill.go.set).start()
        first = staging.take(6)
        assert set(first.tolist()) == {6}
        fill.go.wait(30)
        assert set(first.tolist()) == {6}
    finally:
        fill.go.set()
        staging.close()
    assert set(first.tolist()) == {6}, "no thread runs any more"
