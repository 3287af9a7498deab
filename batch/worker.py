"""What makes jobs, wherever it runs, and what it says."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# What workers say, by `kind`: "ready"; "progress" (phase, done, total) and "note" (text) of the job at hand; one answer
# to each request: "checked" and "made" (values), "failed" and "interrupted" (error), "unable" (error), where another
# worker may be able; and "ended" (error), the last that is heard of it.
ANSWERS = ("checked", "made", "failed", "interrupted", "unable")


@dataclass(frozen=True)
class Message:
    """Something that a worker says."""

    worker: Worker
    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)


Inbox = queue.SimpleQueue[Message]


class Worker(Protocol):
    """Makes one job at a time; what it says comes to the inbox that it was started with."""

    name: str

    @property
    def load(self) -> int:
        """How many jobs wait for it or are made by it, those of others too."""

    def ask(self, kind: str, request: Mapping[str, Any]) -> None:
        """Have it "check" or "make" a job; it answers when that is done."""

    def stop(self) -> None:
        """Have it interrupt what it does, leave it in order, and end; this does not wait."""

    def kill(self) -> None:
        """End it at once."""


class Crew(Protocol):
    """Starts workers. `size` of them work at a time; without any for `patience` seconds the batch gives up."""

    size: int
    patience: float

    def start(self, seat: int, inbox: Inbox) -> Worker:
        """A new worker for a place from 0 to size - 1, the place of one that has ended too."""

    def close(self) -> None:
        """All workers have ended: nothing else of the crew need stay."""
