"""The other end of `process`: a worker's main loop, in a process of its own."""

from __future__ import annotations

import _thread
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol


class JobError(Exception):
    """A job that cannot be checked or made, in words for people; `values` go with it."""

    def __init__(self, error: str, **values: Any) -> None:
        super().__init__(error)
        self.values = values


class Interrupted(KeyboardInterrupt):
    """A job was interrupted; `values` are what there is to say of it."""

    def __init__(self, error: str, **values: Any) -> None:
        super().__init__(error)
        self.values = values


class Maker(Protocol):
    """Checks and makes jobs. Both raise JobError; KeyboardInterrupt passes through them, or becomes Interrupted."""

    def check(self, request: Mapping[str, Any]) -> None:
        """Refuse what could not be made."""

    def make(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make it; what there is to say of it."""


class Channel:
    """This process's pipes: what is said over them is a line, whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # libraries print too
        self._asked: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._saying = threading.Lock()
        self._stopping = self._in_job = self._patient = False
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), self._interrupt)
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, kind: str, values: Mapping[str, Any]) -> None:
        with self._saying, suppress(OSError):  # nobody listens any more: the end comes by the other pipe
            self._out.write(json.dumps({"is": kind, **values}).encode("ascii") + b"\n")
            self._out.flush()

    def next(self) -> Mapping[str, Any] | None:
        """The next request; None when this process is to end."""
        request = None if self._stopping else self._asked.get()
        return None if self._stopping else request

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What goes in here ends with KeyboardInterrupt when this process is to end."""
        self._in_job = True
        try:
            self.check()
            yield
        finally:
            self._in_job = self._patient = False

    def hold(self) -> None:
        """From now on what is to end this process waits for `check`, or for `release`."""
        self._patient = True

    def check(self) -> None:
        """A good moment to stop at: KeyboardInterrupt where this process is to end."""
        if self._stopping and self._in_job:
            self._strike()

    def release(self) -> None:
        """The end strikes at once again, one that waited now; calling it again does nothing."""
        waited, self._patient = self._patient, False
        if waited:
            self.check()

    def _strike(self) -> None:
        """Raise once: what closes a video is not interrupted again."""
        self._in_job = False
        raise KeyboardInterrupt

    def _listen(self) -> None:
        """Until the pipe ends, as it does when the other process is killed."""
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if request["do"] == "stop":
                break
            self._asked.put(request)
        self._stopping = True
        self._asked.put(None)
        _thread.interrupt_main()

    def _interrupt(self, number: int, _: object) -> None:
        """Only in a job is there something to interrupt; a terminal's Ctrl-C is for whoever gives the jobs."""
        if number == signal.SIGTERM:
            self._stopping = True
            self._asked.put(None)
        if not self._patient:
            self.check()


def serve(maker: Callable[[Channel], Maker]) -> int:
    """Answer requests until there are no more; `maker` is given what it can tell of its progress by."""
    channel = Channel()
    made = maker(channel)
    channel.say("ready", {})
    while (request := channel.next()) is not None:
        try:
            with channel.interruptible():
                kind, values = _answer(made, request)
        except KeyboardInterrupt as error:
            more = error.values if isinstance(error, Interrupted) else {}
            channel.say("interrupted", {"error": str(error) or "interrupted", **more})
            break
        channel.say(kind, values)
    return 0


def _answer(made: Maker, request: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    try:
        if request["do"] == "check":
            made.check(request)
            return "checked", {}
        return "made", made.make(request)
    except JobError as error:
        return "failed", {"error": str(error), **error.values}
