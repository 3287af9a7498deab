"""Who gets which job, and what becomes of it when its worker is lost: by workers that are scripts."""

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from lowvram_video.batch import dispatch
from lowvram_video.batch.dispatch import Dispatcher, Event, NoWorkers
from lowvram_video.batch.job import Job
from lowvram_video.batch.worker import Inbox, Message

Script = Callable[["Fake", str, Mapping[str, Any]], None]


class Fake:
    """A worker that answers at once, as its script says."""

    def __init__(self, name: str, inbox: Inbox, script: Script, ready: bool = True) -> None:
        self.name, self.load, self.asked = name, 0, list[int]()
        self.killed = False
        self._inbox, self._script = inbox, script
        if ready:
            self.say("ready")

    def say(self, kind: str, **values: Any) -> None:
        self._inbox.put(Message(self, kind, values))

    def ask(self, kind: str, request: Mapping[str, Any]) -> None:
        self.asked.append(request["line"])
        self._script(self, kind, request)

    def stop(self) -> None:
        self.say("ended", error="stopped")

    def kill(self) -> None:
        self.killed = True


class FakeCrew:
    patience = 0.3

    def __init__(self, *scripts: Script) -> None:
        self.size, self.scripts = len(scripts), scripts
        self.started: list[Fake] = []
        self.closed = False

    def start(self, seat: int, inbox: Inbox) -> Fake:
        self.started.append(Fake(f"w{seat}", inbox, self.scripts[seat]))
        return self.started[-1]

    def close(self) -> None:
        self.closed = True


def makes(worker: Fake, kind: str, request: Mapping[str, Any]) -> None:
    worker.say("made" if kind == "make" else "checked")


def jobs(*models: str) -> list[Job]:
    return [Job(line, Path(f"{line}.mp4"), str(line), {"line": line}, model) for line, model in enumerate(models, 1)]


def run(crew: FakeCrew, work: list[Job], kind: str = "make", retries: int = 2) -> list[Event]:
    with Dispatcher(crew, retries) as dispatcher:
        return [event for event in dispatcher.spread(kind, work) if event is not None]


def ends(events: list[Event]) -> dict[int, str]:
    """How each job ended, by line."""
    return {event.job.line: event.kind for event in events if event.kind not in ("begun", "lost")}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LOOK_SECONDS", 0.01)


def test_each_job_is_made_once_and_a_worker_keeps_to_its_model() -> None:
    crew = FakeCrew(makes, makes)
    events = run(crew, jobs("a", "b", "a", "b", "a", "b"))
    assert ends(events) == dict.fromkeys(range(1, 7), "made")
    assert sorted(line for worker in crew.started for line in worker.asked) == [1, 2, 3, 4, 5, 6]
    for worker in crew.started:
        models = ["ab"[line % 2 == 0] for line in worker.asked]
        assert sum(one != other for one, other in itertools.pairwise(models)) <= 1, "each is loaded once at most"
    assert crew.closed


def test_a_lost_workers_job_goes_to_another_and_is_given_up_in_the_end() -> None:
    def dies(worker: Fake, kind: str, request: Mapping[str, Any]) -> None:
        if request["line"] == 2:
            worker.say("ended", error="exit code -9")
        else:
            makes(worker, kind, request)

    crew = FakeCrew(dies, dies)
    events = run(crew, jobs("a", "a", "a"), retries=2)
    assert ends(events) == {1: "made", 2: "failed", 3: "made"}
    lost = [event.attempt for event in events if event.kind == "lost"]
    assert lost == [1, 2]
    failed = next(event for event in events if event.kind == "failed")
    assert failed.values["error"] == "its worker ended 3 times, at last: exit code -9" and failed.attempt == 3
    assert len(crew.started) == 5


def test_a_job_is_only_refused_where_no_worker_is_able() -> None:
    def cannot(worker: Fake, kind: str, request: Mapping[str, Any]) -> None:
        if request["line"] == 1 or worker.name == "w0":
            worker.say("unable", error=f"no {request['line']}.safetensors")
        else:
            makes(worker, kind, request)

    for kind, good in (("check", "checked"), ("make", "made")):
        events = run(FakeCrew(cannot, cannot), jobs("a", "a"), kind)
        assert ends(events) == {1: "failed", 2: good}
        failed = next(event for event in events if event.kind == "failed")
        assert sorted(str(failed.values["error"]).split("; ")) == [
            "w0: no 1.safetensors",
            "w1: no 1.safetensors",
        ]


def test_the_least_loaded_worker_is_asked_first_and_a_busy_one_not_at_all() -> None:
    class Loaded(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            worker = super().start(seat, inbox)
            worker.load = (5, 0)[seat]
            return worker

    crew = Loaded(makes, makes)
    assert ends(run(crew, jobs("a", "a", "a"))) == dict.fromkeys((1, 2, 3), "made")
    assert [worker.asked for worker in crew.started] == [[], [1, 2, 3]]


def test_nothing_is_handed_out_after_hold() -> None:
    crew = FakeCrew(makes)
    seen = []
    with Dispatcher(crew, 2) as dispatcher:
        for event in dispatcher.spread("make", jobs("a", "a", "a")):
            if event is not None and event.kind == "made":
                seen.append(event.job.line)
                dispatcher.hold()
    assert seen == [1]


def test_a_crew_that_cannot_start_is_given_up() -> None:
    class Broken(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            self.started.append(Fake("w", inbox, makes, ready=False))
            self.started[-1].say("ended", error="exit code 1 (no torch)")
            return self.started[-1]

    crew = Broken(makes)
    with pytest.raises(NoWorkers, match="no worker can be started: exit code 1"):
        run(crew, jobs("a"))
    assert len(crew.started) == 3 and crew.closed


def test_a_crew_that_is_never_ready_is_given_up() -> None:
    class Silent(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            self.started.append(Fake("http://nobody", inbox, makes, ready=False))
            return self.started[-1]

    with pytest.raises(NoWorkers, match=r"no worker was ready for 0\.3 s \(http://nobody\)"):
        run(Silent(makes), jobs("a"))


def test_a_worker_that_never_came_is_not_waited_for() -> None:
    class Half(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            self.started.append(Fake(f"w{seat}", inbox, makes, ready=seat == 0))
            return self.started[-1]

    crew, began = Half(makes, makes), time.monotonic()
    assert ends(run(crew, jobs("a"))) == {1: "made"}
    assert crew.started[1].killed and not crew.started[0].killed and time.monotonic() - began < 5


def test_what_workers_say_as_they_are_stopped_is_heard() -> None:
    class Stubborn(Fake):
        def stop(self) -> None:
            self.say("interrupted", error="interrupted")
            super().stop()

    class Crew(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            return Stubborn("w", inbox, self.scripts[seat])

    with Dispatcher(Crew(lambda worker, kind, request: None), 2) as dispatcher:
        for event in dispatcher.spread("make", jobs("a")):
            if event is None and dispatcher.seats[0].job is not None:
                break
        stopped = dispatcher.stop()
    assert [(event.kind, event.job.line) for event in stopped] == [("interrupted", 1)]


def test_a_job_whose_worker_was_interrupted_by_others_is_lost_and_made_again() -> None:
    def ends_once(worker: Fake, kind: str, request: Mapping[str, Any]) -> None:
        if request["line"] == 1 and not request["attempt"]:  # as after SIGTERM
            worker.say("interrupted", error="interrupted")
            worker.say("ended", error="exit code 0")
        else:
            makes(worker, kind, request)

    for kind, good in (("check", "checked"), ("make", "made")):
        events = run(FakeCrew(ends_once), jobs("a", "a"), kind)
        assert ends(events) == {1: good, 2: good}
        assert [event.kind for event in events if event.job.line == 1] == ["begun", "lost", "begun", good]


def is_able(*names: str) -> Script:
    """Makes a job where the worker's name is one of these."""

    def script(worker: Fake, kind: str, request: Mapping[str, Any]) -> None:
        if worker.name in names:
            makes(worker, kind, request)
        else:
            worker.say("unable", error="no such node")

    return script


def test_a_job_waits_for_a_worker_that_is_able_and_not_ready_yet() -> None:
    class Slow(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            self.started.append(Fake(f"w{seat}", inbox, self.scripts[seat], ready=seat == 0))
            if seat == 1:
                threading.Timer(0.1, lambda: self.started[1].say("ready")).start()
            return self.started[-1]

    assert ends(run(Slow(is_able("w1"), is_able("w1")), jobs("a", "a"), "check")) == {1: "checked", 2: "checked"}


def test_a_job_is_given_up_where_the_only_worker_that_is_able_does_not_come_back() -> None:
    class Gone(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            again = len(self.started) >= self.size
            self.started.append(Fake(f"w{seat}", inbox, self.scripts[seat], ready=not again))
            return self.started[-1]

    def dies(worker: Fake, kind: str, request: Mapping[str, Any]) -> None:
        worker.say("ended", error="does not answer")

    events = run(Gone(is_able("w1"), dies), jobs("a"))
    assert ends(events) == {1: "failed"}
    assert events[-1].values["error"] == "w0: no such node; w1: not there"


def test_a_free_worker_that_is_not_able_keeps_nobody_from_a_busy_one_that_is() -> None:
    class Loaded(FakeCrew):
        def start(self, seat: int, inbox: Inbox) -> Fake:
            worker = super().start(seat, inbox)
            worker.load = (0, 5)[seat]
            return worker

    assert ends(run(Loaded(is_able("w1"), is_able("w1")), jobs("a"))) == {1: "made"}
