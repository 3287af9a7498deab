"""Progress as a terminal shows it: one line per phase, a bar for steps and frames."""

from __future__ import annotations

import time
from typing import TextIO

BAR_WIDTH = 24


class TerminalProgress:
    """Redraws one line on a terminal; elsewhere it writes one line per phase."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.title = ""
        self.started = 0.0
        self.live = stream.isatty()

    def begin(self, title: str) -> None:
        """A phase starts; the one before is done."""
        self.end()
        self.title, self.started = title, time.monotonic()
        self._draw(f"{title} ...")

    def update(self, done: int, total: int) -> None:
        """`done` of `total` steps, frames or bytes of the phase."""
        if not self.live:
            return
        elapsed = time.monotonic() - self.started
        filled = BAR_WIDTH * done // max(total, 1)
        rate = elapsed / done if done else 0.0
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        self._draw(f"{self.title} [{bar}] {done}/{total}  {rate:.2f} s/it  {rate * (total - done):.0f} s left")

    def end(self) -> None:
        """The current phase is done."""
        if self.title:
            self._draw(f"{self.title}: {time.monotonic() - self.started:.1f} s")
            self.stream.write("\n")
            self.title = ""

    def _draw(self, text: str) -> None:
        if self.live:
            self.stream.write(f"\r\x1b[K{text}")
            self.stream.flush()
        elif not text.endswith("..."):
            self.stream.write(text)
