"""A worker of a Ray cluster as a batch sees it, by an actor that is a script: Ray itself is an extra."""

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lowvram_video.batch.ray_crew import RayWorker
from lowvram_video.batch.worker import Inbox, Message

FILM = b"a film"


class RayError(Exception):
    pass


class Actor:
    """Says what it is scripted to; what it was told is in `told`."""

    def __init__(self, *said: Any) -> None:
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self._said, self._more = list(said), threading.Event()
        self.say = SimpleNamespace(remote=self._tell)
        self.heard = SimpleNamespace(remote=lambda seconds: self._next)
        self.read = SimpleNamespace(remote=lambda path: lambda: FILM)

    def _tell(self, kind: str, request: Mapping[str, Any]) -> None:
        self.told.append((kind, request))
        self._more.set()

    def _next(self) -> Any:
        self._more.wait(10)
        if not self._said:
            raise RayError("the actor died")
        said = self._said.pop(0)
        if isinstance(said, BaseException):
            raise said
        return [said]


def ray(killed: list[Actor]) -> Any:
    def get(reference: Callable[[], Any]) -> Any:
        return reference()

    return SimpleNamespace(get=get, kill=killed.append, exceptions=SimpleNamespace(RayError=RayError))


def asked(actor: Actor, kind: str, request: Mapping[str, Any], most: int = 9) -> list[tuple[str, Mapping[str, Any]]]:
    """What a worker says of a job until it ends, or refuses it here."""
    inbox: Inbox = queue.SimpleQueue[Message]()
    killed: list[Actor] = []
    before = set(threading.enumerate())
    worker = RayWorker(cast(Any, ray(killed)), "ray 1", actor, inbox)
    worker.ask(kind, request)
    said = []
    for _ in range(most):
        message = inbox.get(timeout=10)
        said.append((message.kind, message.values))
        if message.kind == "ended":
            assert killed == [actor]
            for thread in set(threading.enumerate()) - before:
                thread.join(10)  # a fault of it is told within this test
            break
    return said


def job(path: Path, **values: Any) -> dict[str, Any]:
    return {"output": str(path), "overwrite": False, "attempt": 0, "own": False, **values}


def test_a_film_of_another_machines_disk_is_brought(tmp_path: Path) -> None:
    said = asked(Actor(("made", {"sha256": "other"})), "make", job(tmp_path / "new" / "a.mp4"))
    assert [kind for kind, _ in said] == ["made", "ended"] and said[-1][1]["error"] == "the actor died"
    assert (tmp_path / "new" / "a.mp4").read_bytes() == FILM


@pytest.mark.parametrize("kind", ["check", "make"])
def test_a_file_of_this_machine_is_not_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"precious")
    actor = Actor(("made", {"sha256": "other"}))
    [(answer, values)] = asked(actor, kind, job(tmp_path / "a.mp4"), most=1)
    assert answer == "failed" and "exists already" in values["error"] and not actor.told
    assert (tmp_path / "a.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize("allowed", [{"overwrite": True}, {"own": True}, {"attempt": 1}])
def test_its_own_is(tmp_path: Path, allowed: Mapping[str, Any]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"left")
    asked(Actor(("made", {"sha256": "other"})), "make", job(tmp_path / "a.mp4", **allowed))
    assert (tmp_path / "a.mp4").read_bytes() == FILM


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_thread_ends_the_worker(tmp_path: Path) -> None:
    said = asked(Actor(KeyError("sha256")), "make", job(tmp_path / "a.mp4"))
    assert [kind for kind, _ in said] == ["ended"]
