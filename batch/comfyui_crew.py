"""Workers that are ComfyUI servers: a thread here for each, which queues one job at a time and brings its film."""

from __future__ import annotations

import copy
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..system.output_lock import OutputLock, file_sha256
from .comfyui_client import ComfyUIServer, ServerLost, ServerRefused
from .job import check_output
from .job_values import JobValues, fill
from .worker import Inbox, Message
from .workflow import ObjectInfo, Prompt, check_prompt, make_prompt

LOOK_SECONDS = 0.5
LOST_SECONDS = 10.0  # without an answer
FORGOTTEN_LOOKS = 3  # of a prompt that is neither queued nor ended: the server was started anew
MOST_POSTS = 5
JOBS = uuid.UUID("5f0f6c1e-8d0e-5c64-9a2b-6c9d3b7f3c11")  # of which prompts' ids are made: the same job has the same


T = TypeVar("T")


class _Stopped(Exception):
    """The batch ends."""


class ComfyUIWorker:
    """See `Worker`: a server, from when it first answers until it does no more."""

    def __init__(self, url: str, inbox: Inbox) -> None:
        self.name, self.load = url, 0
        self._server, self._inbox = ComfyUIServer(url), inbox
        self._asked: queue.SimpleQueue[tuple[str, Mapping[str, Any]]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._object_info: ObjectInfo = {}
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, kind: str, request: Mapping[str, Any]) -> None:
        self._asked.put((kind, request))

    def stop(self) -> None:
        self._stopping.set()

    def kill(self) -> None:
        self._stopping.set()

    def _say(self, kind: str, **values: Any) -> None:
        self._inbox.put(Message(self, kind, values))

    def _work(self) -> None:
        error = "a fault of this program: see what it printed"
        try:
            self._wait_until_up()
            self._say("ready")
            while not self._stopping.is_set():
                try:
                    kind, request = self._asked.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    self._look()
                    continue
                self._answer(kind, request)
            error = "the batch ended"
        except ServerLost as lost:
            error = str(lost)
        except _Stopped:
            error = "the batch ended"
        finally:  # whatever ends this thread: its job is not waited for
            self._say("ended", error=error)

    def _answer(self, kind: str, request: Mapping[str, Any]) -> None:
        try:
            if kind == "check":
                check_output(kind, request)
                _check_files(request)
                self._filled(request, {})
                self._say("checked")
            else:
                with _locked(Path(request["output"])):
                    check_output(kind, request)  # somebody may have made it meanwhile
                    self._say("made", **self._make(request))
        except ServerRefused as refused:  # another may have the file, or the node
            self._say("unable", error=str(refused))
        except ServerLost:
            raise
        except _Stopped:
            self._say("interrupted", error="interrupted")
            raise
        except (ValueError, OSError) as error:
            self._say("failed", error=str(error))

    # --- one job

    def _filled(self, request: Mapping[str, Any], sent: Mapping[str, str]) -> Prompt:
        """The job's prompt, as far as this server can make it; ServerRefused where it cannot."""
        try:
            prompt = make_prompt(request["workflow"], self._object_info)
            filled = fill(prompt, _values(request), sent)
            check_prompt(prompt, self._object_info, filled)
        except ValueError as error:
            raise ServerRefused(str(error)) from error
        except (LookupError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ServerRefused(
                f"the workflow is not as ComfyUI's page saves one ({what}): save it there anew"
            ) from error
        return prompt

    def _make(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        began = time.monotonic()
        for number in range(MOST_POSTS):
            prompt_id = str(uuid.uuid5(JOBS, f"{request['key']} {number}"))
            entry = self._patiently(partial(self._server.history, prompt_id))
            is_new = entry is None
            if is_new:
                if prompt_id not in self._look():
                    prompt_id = self._post(prompt_id, request)
                entry = self._wait(prompt_id)
                if entry is not None and not _succeeded(entry):
                    raise ValueError(_why(entry))
            if entry is None or not _succeeded(entry):  # of an earlier batch, or the server was started anew
                continue
            target = Path(request["output"])
            self._look()
            try:
                self._server.download(_film(entry, target), target)
            except ServerRefused:
                if is_new:
                    raise
                continue  # somebody has removed what an earlier batch made
            return {
                "seconds": round(time.monotonic() - began, 3),
                "bytes": target.stat().st_size,
                "sha256": file_sha256(target),
                "prompt_id": prompt_id,
            }
        raise ServerLost(f"forgot the job {MOST_POSTS} times")

    def _post(self, prompt_id: str, request: Mapping[str, Any]) -> str:
        """Queue the job; the id that the server knows it by."""
        sent = {
            name: self._server.upload(file, f"{file_sha256(file)[:32]}{file.suffix.lower()}")
            for name, file in _values(request).files.items()
        }
        graph = self._filled(request, sent).graph
        known_by = self._server.queue(graph, prompt_id)
        self._say("progress", phase="queued")
        return known_by

    def _wait(self, prompt_id: str) -> Mapping[str, Any] | None:
        """What became of a queued prompt; None where the server knows it no more."""
        missing = 0
        while missing < FORGOTTEN_LOOKS:
            if self._stopping.wait(LOOK_SECONDS):
                with suppress(ServerRefused, ServerLost):
                    self._server.cancel(prompt_id)
                raise _Stopped
            queued = self._look()
            entry = self._patiently(partial(self._server.history, prompt_id))
            if entry is not None:
                return entry
            missing = 0 if prompt_id in queued else missing + 1
        return None

    # --- the server

    def _wait_until_up(self) -> None:
        told = ""
        while not self._stopping.is_set():
            try:
                self._look_once()
                self._object_info = self._server.object_info()
                return
            except (ServerLost, ServerRefused) as error:
                if told != str(error):
                    told = str(error)
                    self._say("note", text=told)
                self._stopping.wait(2 * LOOK_SECONDS)
        raise _Stopped

    def _look(self) -> list[str]:
        """What is queued there, which is its load."""
        return self._patiently(self._look_once)

    def _look_once(self) -> list[str]:
        queued = self._server.queued()
        self.load = len(queued)
        return queued

    def _patiently(self, ask: Callable[[], T]) -> T:
        """An answer, asked for again for a while: networks have moments."""
        end = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return ask()
            except (ServerLost, ServerRefused) as error:
                if time.monotonic() > end or self._stopping.wait(LOOK_SECONDS):
                    raise ServerLost(str(error)) from error


class ComfyUICrew:
    """See `Crew`: a worker for each server."""

    patience = 120.0

    def __init__(self, urls: Sequence[str]) -> None:
        self.size, self._urls = len(urls), urls

    def start(self, seat: int, inbox: Inbox) -> ComfyUIWorker:
        return ComfyUIWorker(self._urls[seat], inbox)

    def close(self) -> None:
        return


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The file is this process's to write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = OutputLock(path)
    try:
        yield
    finally:
        lock.release()


def _check_files(request: Mapping[str, Any]) -> None:
    for file in _values(request).files.values():
        if not file.is_file():
            raise ValueError(f"{file}: no such file")


def _values(request: Mapping[str, Any]) -> JobValues:
    return JobValues(request["values"], copy.deepcopy(request["nodes"]))


def _succeeded(entry: Mapping[str, Any]) -> bool:
    return _status(entry).get("status_str") == "success"


def _status(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    status = entry.get("status")
    return status if isinstance(status, dict) else {}


def _why(entry: Mapping[str, Any]) -> str:
    """What a prompt's failure says, in one line."""
    for message in reversed(_listed(_status(entry).get("messages"))):
        kind, values = (*_listed(message), None, None)[:2]
        if kind == "execution_error" and isinstance(values, dict):
            error = f"{values.get('node_type')}: {values.get('exception_message')}"
            return " ".join(error.split())[:1000]
        if kind == "execution_interrupted":
            return "somebody interrupted it on the server"
    return "the server says that it failed, and not why"


def _listed(value: Any) -> list[Any]:
    """A list of a server's answer; empty where it is none."""
    return value if isinstance(value, list) else []


def _film(entry: Mapping[str, Any], target: Path) -> Mapping[str, Any]:
    """The last file of a prompt's outputs that ends as `target` does. ValueError where there is none."""
    outputs = entry.get("outputs")
    files = [
        file
        for node in (outputs.values() if isinstance(outputs, dict) else ())
        for found in (node.values() if isinstance(node, dict) else ())
        for file in _listed(found)
        if isinstance(file, dict) and file.get("filename") and file.get("type") == "output"
    ]
    fitting = [file for file in files if Path(str(file["filename"])).suffix.lower() == target.suffix.lower()]
    if not fitting:
        made = ", ".join(str(file["filename"]) for file in files) or "no file"
        raise ValueError(f"the workflow made {made}, and nothing that ends in {target.suffix or 'no suffix'}")
    return fitting[-1]
