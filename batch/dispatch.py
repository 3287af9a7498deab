"""Jobs are handed to whoever is free; what a lost worker had is handed to another."""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .job import Job
from .worker import ANSWERS, Crew, Inbox, Message, Worker

LOOK_SECONDS = 0.2  # Windows hears Ctrl-C between two looks
MOST_EARLY_ENDS = 3  # of workers in one place that end before they are ready
STOP_SECONDS = 60.0  # for a video to be closed


class NoWorkers(ValueError):
    """Nobody is left to make anything."""


@dataclass(frozen=True)
class Event:
    """What happened to a job: "begun", "lost" with its worker, or an answer. `values` are the worker's."""

    kind: str
    job: Job
    worker: str
    values: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1


@dataclass
class Seat:
    """A worker's place: who has it, and what that does."""

    worker: Worker
    ready: bool = False
    job: Job | None = None
    model: str = ""  # of its last job
    progress: str = ""
    early_ends: int = 0
    ended: bool = False


class Dispatcher:
    """A crew at work; a context manager that ends it. `tell` is given notes for people as they come."""

    def __init__(self, crew: Crew, retries: int) -> None:
        self.crew, self.retries = crew, retries
        self.inbox: Inbox = queue.SimpleQueue()
        self.seats: list[Seat] = []
        self.notes: deque[str] = deque()  # for people, until they are shown
        self._pending: deque[Job] = deque()
        self._held = False
        self._attempts: Counter[int] = Counter()  # by line
        self._unable: dict[int, dict[str, str]] = {}  # by line: who is not able, and why
        self._stuck_since: dict[int, float] = {}  # by line: when first nobody who is ready was able
        self._idle_since = time.monotonic()

    def __enter__(self) -> Dispatcher:
        try:
            for number in range(self.crew.size):
                self.seats.append(Seat(self.crew.start(number, self.inbox)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.crew.close()

    def spread(self, kind: str, jobs: Sequence[Job]) -> Generator[Event | None, None, None]:
        """Have every job checked or made ("check", "make"); None when there is only progress to show.

        Ends early after `hold`, when what was begun is done. Raises NoWorkers.
        """
        self._pending, self._held = deque(jobs), False
        self._attempts.clear()
        self._unable.clear()
        self._stuck_since.clear()
        self._idle_since = time.monotonic()
        while self._pending or any(seat.job for seat in self.seats):
            while self.inbox.empty() and (pair := self._next_pair()) is not None:
                seat, job = pair
                seat.job, seat.model, seat.progress = job, job.model, ""
                yield Event("begun", job, seat.worker.name, attempt=self._attempts[job.line] + 1)
                seat.worker.ask(kind, dict(job.request) | {"attempt": self._attempts[job.line]})
            self._give_up_in_time()
            if (stuck := self._stuck()) is not None:
                yield stuck
                continue
            try:
                message = self.inbox.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                yield None
                continue
            yield self._heard(message)

    def hold(self) -> None:
        """Hand out no more, nor again what is lost."""
        self._held = True
        self._pending.clear()

    def stop(self) -> list[Event]:
        """End all workers, those that are busy in order; what they say of their jobs meanwhile."""
        events = []
        for seat in self.seats:
            if seat.ready:
                seat.worker.stop()
            elif not seat.ended:  # it may wait for a machine that never comes
                seat.worker.kill()
                seat.ended = True
        end = time.monotonic() + STOP_SECONDS
        try:
            while any(not seat.ended for seat in self.seats) and time.monotonic() < end:
                try:
                    message = self.inbox.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    continue
                heard = self._seat_of(message.worker)
                if heard is not None and message.kind == "ended":
                    heard.ended = True
                elif heard is not None and message.kind in ANSWERS and heard.job is not None:
                    attempt = self._attempts[heard.job.line] + 1
                    events.append(Event(message.kind, heard.job, heard.worker.name, message.values, attempt))
                    heard.job = None
        finally:
            for seat in self.seats:
                if not seat.ended:
                    seat.worker.kill()
                    seat.ended = True
        return events

    # --- who does what

    def _next_pair(self) -> tuple[Seat, Job] | None:
        """A free worker, the least loaded first, and the job for it."""
        if not self._pending:
            return None
        ready = [seat for seat in self.seats if seat.ready and self._is_able(seat)]
        least = min((seat.worker.load for seat in ready), default=0)
        for seat in ready:
            if seat.job is None and seat.worker.load <= least:
                job = self._job_for(seat)
                if job is not None:
                    self._pending.remove(job)
                    return seat, job
        return None

    def _is_able(self, seat: Seat) -> bool:
        """Whether something is left that it has not found itself unable to make."""
        return any(seat.worker.name not in self._unable.get(job.line, {}) for job in self._pending)

    def _job_for(self, seat: Seat) -> Job | None:
        """The first job of the model that it has; else of one that nobody else has; else the first."""
        taken = {other.model for other in self.seats if other is not seat}
        wishes: tuple[Callable[[Job], bool], ...] = (
            lambda job: job.model == seat.model,
            lambda job: job.model not in taken,
            lambda job: True,
        )
        for wish in wishes:
            for job in self._pending:
                if wish(job) and seat.worker.name not in self._unable.get(job.line, {}):
                    return job
        return None

    # --- what they say

    def _heard(self, message: Message) -> Event | None:
        seat = self._seat_of(message.worker)
        if seat is None:  # of one that was replaced
            return None
        if message.kind == "ready":
            seat.ready, seat.early_ends = True, 0
        elif message.kind == "progress":
            seat.progress = _progress(message.values)
        elif message.kind == "note":
            name = seat.job.output.name if seat.job else seat.worker.name
            self.notes.append(f"{name}: {message.values.get('text', '')}")
        elif message.kind == "ended":
            return self._ended(seat, str(message.values.get("error", "it ended")))
        elif message.kind == "interrupted":  # by others, as nobody here has stopped it: it ends, and its job is lost
            return None
        elif message.kind in ANSWERS and seat.job is not None:
            return self._answered(seat, message)
        return None

    def _answered(self, seat: Seat, message: Message) -> Event | None:
        job, seat.job = seat.job, None
        assert job is not None
        if message.kind != "unable":
            return Event(message.kind, job, seat.worker.name, message.values, self._attempts[job.line] + 1)
        unable = self._unable.setdefault(job.line, {})
        unable[seat.worker.name] = str(message.values.get("error", ""))
        others = [other for other in self.seats if not other.ended and other.worker.name not in unable]
        if others and not self._held:  # one that is not ready may be soon
            self._pending.appendleft(job)
            return None
        return self._refused(job)

    def _refused(self, job: Job) -> Event:
        """Nobody is able: why not, by each."""
        unable = self._unable.pop(job.line)
        absent = [seat.worker.name for seat in self.seats if not seat.ready and seat.worker.name not in unable]
        error = "; ".join(
            f"{name}: {why}" for name, why in [*unable.items(), *((name, "not there") for name in absent)]
        )
        return Event("failed", job, next(reversed(unable)), {"error": error}, self._attempts[job.line] + 1)

    def _stuck(self) -> Event | None:
        """Give up a job that nobody who is ready is able to make, where others have not come for long."""
        ready = {seat.worker.name for seat in self.seats if seat.ready}
        now = time.monotonic()
        for job in self._pending if self._unable else ():
            if not ready <= self._unable.get(job.line, {}).keys() or job.line not in self._unable:
                self._stuck_since.pop(job.line, None)
            elif now - self._stuck_since.setdefault(job.line, now) > self.crew.patience:
                self._pending.remove(job)
                return self._refused(job)
        return None

    def _ended(self, seat: Seat, error: str) -> Event | None:
        """Put another in its place, and its job back; a job whose workers all end is given up."""
        job, seat.job, name = seat.job, None, seat.worker.name
        if not seat.ready:
            seat.early_ends += 1
        seat.ready, seat.progress, seat.model = False, "", ""
        if seat.early_ends < MOST_EARLY_ENDS:
            seat.worker = self.crew.start(self.seats.index(seat), self.inbox)
        else:
            seat.ended = True
        if all(each.ended for each in self.seats):
            raise NoWorkers(f"no worker can be started: {error}")
        if job is None:
            self.notes.append(f"{name} ended: {error}")
            return None
        self._attempts[job.line] += 1
        attempt = self._attempts[job.line]
        if attempt > self.retries:
            return Event("failed", job, name, {"error": f"its worker ended {attempt} times, at last: {error}"}, attempt)
        if not self._held:
            self._pending.appendleft(job)
        return Event("lost", job, name, {"error": error}, attempt)

    def _seat_of(self, worker: Worker) -> Seat | None:
        return next((seat for seat in self.seats if seat.worker is worker), None)

    def _give_up_in_time(self) -> None:
        if any(seat.ready for seat in self.seats):
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > self.crew.patience:
            names = ", ".join(seat.worker.name for seat in self.seats)
            raise NoWorkers(f"no worker was ready for {self.crew.patience:g} s ({names}): look at what they say")


def _progress(values: Mapping[str, Any]) -> str:
    total = values.get("total")
    return f"{values.get('phase', '')} {values.get('done')}/{total}" if total else str(values.get("phase", ""))
