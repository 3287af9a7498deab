"""A worker that is a process of this machine, told and heard over its pipes, one JSON object a line."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from ..system.host_memory import available_ram_bytes
from ..system.sizes import GIB
from .worker import Inbox, Message

LAST_WORDS_BYTES = 4000

Heard = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Command:
    """How a worker's process is started: its words, and what its environment has beside this one's."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def sharing_ram(words: Sequence[str], num_workers: int) -> list[str]:
    """A worker's words, with its share of the RAM that is free now where others work beside it: each would else count
    on all of it."""
    return [*words, *(["--ram-share", f"{available_ram_bytes() / GIB / num_workers:.3f}"] if num_workers > 1 else [])]


class ChildProcess:
    """A process that runs `child.serve`; `heard` is called by a thread, at last with "ended"."""

    def __init__(self, command: Command, heard: Heard) -> None:
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - read when it ends
        self._heard = heard
        self._process = subprocess.Popen(
            list(command.words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, **command.environment},
            # out of the terminal's process group: it is told to stop once, by its pipe, and then closes its video
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, kind: str, request: Mapping[str, Any]) -> None:
        """Tell it something; one that has ended does not hear it, and `heard` tells that."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # a closed pipe
            self._process.stdin.write(json.dumps({"do": kind, **request}).encode("ascii") + b"\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """Have it interrupt what it does and end."""
        self.say("stop", {})

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):
                said = json.loads(line)
                self._heard(str(said.pop("is")), said)
        code = self._process.wait()
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._heard("ended", {"error": f"exit code {code}{self._last_words()}"})

    def _last_words(self) -> str:
        size = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, size - LAST_WORDS_BYTES))
        lines = [line.strip() for line in self._complaints.read().decode(errors="replace").splitlines()]
        self._complaints.close()
        return f" ({lines[-1]})" if lines and lines[-1] else ""


class LocalWorker:
    """See `Worker`: a process of this machine."""

    def __init__(self, name: str, command: Command, inbox: Inbox) -> None:
        self.name = name
        self._child = ChildProcess(command, lambda kind, values: inbox.put(Message(self, kind, values)))
        self.load = 0  # nobody else gives it work

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, kind: str, request: Mapping[str, Any]) -> None:
        self._child.say(kind, request)

    def stop(self) -> None:
        self._child.stop()

    def kill(self) -> None:
        self._child.kill()


class LocalCrew:
    """See `Crew`: processes of this machine, `commands` one for each place."""

    patience = 600.0  # a slow disk from which PyTorch is loaded

    def __init__(self, commands: Sequence[Command]) -> None:
        self.size, self._commands = len(commands), commands

    def start(self, seat: int, inbox: Inbox) -> LocalWorker:
        return LocalWorker(f"worker {seat + 1}", self._commands[seat], inbox)

    def close(self) -> None:
        return
