"""A program that does nothing any more is ended: a run of hours does not wait for it for ever."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STUCK_SECONDS = 300.0  # ffmpeg takes a frame of 4K in two seconds where it is slow, and ends a file in some more


class Watched:
    """A program whose every piece of work takes less than `seconds`, or it is killed; `stuck` then says so."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float = STUCK_SECONDS) -> None:
        self.process, self._seconds = process, seconds
        self.stuck = ""

    @contextmanager
    def working(self) -> Iterator[None]:
        """One piece of work: a write, a read, or waiting for its end."""
        timer = threading.Timer(self._seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def wait(self) -> int:
        """Its exit status."""
        with self.working():
            return self.process.wait()

    def ends_well(self) -> bool:
        """Whether its exit status is 0, at its end; after Ctrl-C, too, it has ended."""
        try:
            return self.wait() == 0
        finally:
            self.process.kill()
            self.process.wait()

    def _end(self) -> None:
        self.stuck = f"it did nothing for {self._seconds:g} s and was ended"
        self.process.kill()
