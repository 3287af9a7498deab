"""Progress as a terminal shows it: one line per phase, a bar for steps and frames."""

from __future__ import annotations

import time
from typing import NoReturn, TextIO

from tqdm import tqdm

from ..runtime.progress import Progress
from .interrupts import PatientInterrupts

BEGUN = "{desc} ..."
BAR = "{desc} [{bar:24}] {n_fmt}/{total_fmt}  {rate_inv_fmt}  {remaining_s:.0f} s left"


COMPUTES = ("denoise", "section", "upscale")  # how titles of phases begin in which Ctrl-C waits for a block


class TerminalProgress(Progress):
    """Redraws one line on a terminal; elsewhere it writes one line per phase.

    While the model computes, Ctrl-C waits for its block: `block` is called before each.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._interrupts = PatientInterrupts()
        self._bar: tqdm[NoReturn] | None = None
        self._title, self._started = "", 0.0

    def begin(self, title: str) -> None:
        self.end()
        self._title, self._started = title, time.monotonic()
        # `disable` of None: where the stream is no terminal
        self._bar = tqdm(desc=title, bar_format=BEGUN, ascii=".#", file=self.stream, leave=False, disable=None)
        if title.startswith(COMPUTES):
            self._interrupts.hold()

    def block(self) -> None:
        """Another block of the model begins; KeyboardInterrupt where the user wants to stop."""
        self._interrupts.check()

    def update(self, done: int, total: int) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.bar_format, self._bar.n, self._bar.total = BAR, done, total
            self._bar.refresh()

    def end(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
            self.stream.write(f"{self._title}: {time.monotonic() - self._started:.1f} s\n")
        self._interrupts.release()
