"""What the page says of a node while it runs, by ComfyUI's own channel for that."""

from __future__ import annotations

import time
from collections.abc import Callable

from comfy_execution.utils import get_executing_context

from ...runtime.status_texts import loading_for
from . import host
from .page import running_server

TELLS_AFTER = 1.0  # seconds of work, and again: what takes less is not worth a word

Tell = Callable[[str], None]


def teller() -> Tell:
    """What shows a text on the node that runs now, until another is told.

    It shows nothing where there is no page, or where this ComfyUI has no such texts.
    """
    server, context = running_server(), get_executing_context()
    send = getattr(server, "send_progress_text", None)
    client = getattr(server, "client_id", None)
    if send is None or context is None or client is None:
        return lambda _: None
    return lambda text: send(text, context.node_id, client)


class Loading:
    """Weights are read: `check` is called meanwhile, and raises once the user has asked to stop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._tell = clock, teller()
        self._text = ""
        self._began: float | None = None
        self._told = 0.0

    def expect(self, text: str) -> None:
        """What to say on the node that runs now while anything is read; "" from the first pass on, which checks too."""
        self._text, self._tell, self._began = text, teller(), None

    def check(self) -> None:
        """More is read. Raises ComfyUI's InterruptProcessingException (a BaseException)."""
        host.stop_if_interrupted()
        now = self._clock()
        if self._began is None:
            self._began = self._told = now
        if self._text and now - self._told >= TELLS_AFTER:
            self._told = now
            self._tell(loading_for(self._text, now - self._began))
