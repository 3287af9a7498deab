"""Ctrl-C that lets a block of the model finish: what was computed is recorded, and nothing is left half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class PatientInterrupts:
    """While held, the first Ctrl-C or SIGTERM waits for `check`; the second one, and any other time, strikes at once.

    KeyboardInterrupt from `check` and `release`. Nothing is held outside the main thread, which alone has signals.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, object] = {}
        self._noted = False

    def hold(self) -> None:
        """From now on interrupts wait; calling it again does nothing."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell's `&` has Ctrl-C meant for others ignored
                self._before[number] = signal.signal(number, self._note)

    def check(self) -> None:
        """A good moment to stop at."""
        if self._noted:
            self.release()

    def release(self) -> None:
        """Interrupts strike at once again, one that waited now; calling it again does nothing."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            # None: one that Python did not install
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        noted, self._noted = self._noted, False
        if noted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            self.release()
        self._noted = True
