"""The threads of several cards, one for each: they begin a pass together, and end it together whatever happens."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .carriers import AS_THEY_ARE, Carrier
from .exchange import Exchange
from .link import Link, links_for
from .mail import TIMEOUT_SECONDS, Choose, Mail, TeamError, TeamStopped, first_of
from .share import Share
from .streams import CallerStreams

T = TypeVar("T")

_POLL_SECONDS = 0.1


@dataclass
class _Job:
    """Something that one card's thread does; `done` is set whatever comes of it."""

    task: Callable[[], Any]
    device: torch.device
    streams: CallerStreams
    inference: bool
    result: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            with torch.inference_mode(self.inference), self.streams.on(self.device):
                self.result = self.task()
        except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
            self.error = error
        finally:
            self.done.set()


class Team:
    """Cards by their numbers: 0 works on the caller's thread, each other one on a thread of its own.

    The threads are there between the first pass and `close`. `links` are the cards' copies, chosen where not given;
    `choose` is who goes on, where several could (see `Mail`).
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        links: Sequence[Link] | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        choose: Choose = first_of,
    ) -> None:
        self.devices = tuple(devices)
        self.mail = Mail(len(devices), timeout_seconds, choose)
        chosen = links_for(devices) if links is None else links
        self.exchanges = [Exchange(rank, self.mail, link) for rank, link in enumerate(chosen)]
        self._jobs: list[queue.SimpleQueue[_Job | None]] = []
        self._hung = False

    def share(
        self,
        rank: int,
        ranks: Sequence[int],
        sizes: tuple[int, ...] | None = None,
        carrier: Carrier = AS_THEY_ARE,
        in_step: bool = True,
    ) -> Share:
        """A card's place among those of the team that share a pass; see there."""
        return Share(self.exchanges[rank], tuple(ranks), sizes, carrier, in_step)

    def run(self, task: Callable[[int], T], in_turns: bool = True) -> list[T]:
        """What `task` makes of each number. Where one fails all stop, and its error is raised.

        Threads take turns, so that each asks its card for work without waiting for Python's lock at every call; or run
        all at once, where nothing is exchanged. TeamError where a card does not stop in time: nothing else can be done
        with that one.
        """
        if self._hung:
            raise TeamError("a card of this team hung before: start the program anew, without that card")
        self._start()
        self.mail.begin(in_turns)
        streams, inference = CallerStreams(self.devices), torch.is_inference_mode_enabled()
        jobs = [
            _Job(self._stopping(task, rank), device, streams, inference) for rank, device in enumerate(self.devices)
        ]
        given: list[_Job] = []
        try:
            for waiting, job in zip(self._jobs, jobs[1:], strict=True):
                waiting.put(job)
                given.append(job)
            jobs[0].run()
            self._join(given)
        except BaseException:  # an interrupt between two commands
            self.mail.stop()
            if not self._hung:
                self._join(given)
                self._abandon()
            _take_error(jobs)
            raise
        error = _take_error(jobs)
        if error is None:
            return [job.result for job in jobs]
        self._abandon()
        try:
            raise error
        finally:
            del error

    def close(self) -> None:
        """End the threads; calling it again does nothing."""
        for waiting in self._jobs:
            waiting.put(None)
        self._jobs.clear()

    def __del__(self) -> None:
        if hasattr(self, "_jobs"):
            self.close()

    def _stopping(self, task: Callable[[int], T], rank: int) -> Callable[[], T]:
        def run() -> T:
            try:
                self.mail.enter(rank)
                made = task(rank)
                self.mail.leave(rank)
                return made
            except BaseException:
                self.mail.stop()
                raise

        return run

    def _start(self) -> None:
        for rank in range(1 + len(self._jobs), len(self.devices)):  # an interrupt may have left some
            waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
            thread = threading.Thread(target=_work, args=(waiting,), name=f"lowvram-card-{rank}", daemon=True)
            thread.start()
            self._jobs.append(waiting)

    def _join(self, jobs: Sequence[_Job]) -> None:
        """Wait for the others: after this one they end too, or at their next letter where one has failed."""
        for rank, job in enumerate(jobs, 1):
            waited = 0.0
            while not job.done.wait(_POLL_SECONDS):
                waited += _POLL_SECONDS
                if waited > self.mail.timeout_seconds:
                    self._hung, asked = True, self.mail.asked[rank]
                    self.mail.stop()
                    raise TeamError(
                        f"card {asked} ({self.devices[asked]}) has not ended its part of a pass for "
                        f"{self.mail.timeout_seconds:g} s: it hangs or has gone; look at nvidia-smi, and leave that "
                        "card out of the devices"
                    )

    def _abandon(self) -> None:
        for exchange in self.exchanges:
            try:
                exchange.abandon()
            except TeamError:  # nothing that it has may be used by others
                self._hung = True
            except RuntimeError:  # the device that failed says so again
                continue
        self.mail.forget()


def _work(waiting: queue.SimpleQueue[_Job | None]) -> None:
    """A card's thread."""
    while (job := waiting.get()) is not None:
        job.run()
        del job  # what it made is the caller's alone


def _take_error(jobs: Sequence[_Job]) -> BaseException | None:
    """The error that stopped the others, rather than one of those who were stopped; the jobs have none any more.

    An error holds its job, by the frame that ran that, and all that the card was making: held by the job it would stay
    until Python looks for garbage, and a leaner plan would find the card full.
    """
    errors = [job.error for job in jobs if job.error is not None]
    for job in jobs:
        job.error = None
    causes = [error for error in errors if not isinstance(error, TeamStopped)]
    return next(iter(causes or errors), None)
