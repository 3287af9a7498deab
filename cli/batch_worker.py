"""A worker of `batch`: `python -m lowvram_video.cli.batch_worker`, told of jobs over its standard input.

A model stays open, and its weights in RAM, from one job to the next of the same files and settings.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..batch.child import Channel, Interrupted, JobError, serve
from ..runtime.progress import Progress
from ..system.output_lock import OutputLock, file_sha256
from .arguments import FamilyCommands, OpenedModel
from .failure import failure
from .generate import commands_of
from .job_flags import JobParser
from .progress import COMPUTES
from .report import show_report

TELL_SECONDS = 0.2
LOOK_SECONDS = 0.2
FREE_SECONDS = 60.0  # for an output to be free that another worker had


class ToldProgress(Progress):
    """Tells who asked for the job how far it is, a few times a second at most.

    While the model computes, what ends the job waits for its block, as Ctrl-C does in `generate`.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._phase, self._told = "", 0.0

    def begin(self, title: str) -> None:
        self.end()
        self._phase, self._told = title, time.monotonic()
        self._channel.say("progress", {"phase": title})
        if title.startswith(COMPUTES):
            self._channel.hold()

    def block(self) -> None:
        self._channel.check()

    def update(self, done: int, total: int) -> None:
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._channel.say("progress", {"phase": self._phase, "done": done, "total": total})

    def end(self) -> None:
        self._channel.release()


class VideoMaker:
    """Makes the videos of jobs, of which a request has `words`: flags of `generate`."""

    def __init__(self, channel: Channel, ram_share_gib: float | None = None) -> None:
        """`ram_share_gib` is what it may use of the RAM where others make videos beside it and a job says nothing."""
        self._parser = JobParser()
        self._progress = ToldProgress(channel)
        self._ram_share_gib = ram_share_gib
        self._opened: OpenedModel | None = None
        self._key: Hashable = None

    def check(self, request: Mapping[str, Any]) -> None:
        """Refuse what could not be made; JobError."""
        with _in_words(io.StringIO()):
            options = self._parser.parse_args(request["words"])
            options.overwrite |= bool(request.get("own"))
            commands = commands_of(options)
            commands.check(self._open(commands, options), options)

    def make(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make a job's video; JobError with `left`, what is at its place all the same."""
        began, said = time.monotonic(), io.StringIO()
        options = self._parser.parse_args(request["words"])
        # what is there may have been left by a worker that was lost
        is_own = bool(request.get("own")) or bool(request.get("attempt"))
        options.overwrite |= is_own
        before = {} if is_own else _left(options.output)  # somebody else's, and it stays that
        try:
            with _in_words(said), redirect_stdout(said):
                commands = commands_of(options)
                opened = self._open(commands, options)
                if is_own:
                    _wait_until_free(options.output)
                show_report(commands.make(opened, options), options)
        except BaseException as error:
            self._close()  # it may be in any state
            left = _left(options.output)
            left = {} if left == before else left
            if isinstance(error, JobError):
                error.values |= left
            elif isinstance(error, KeyboardInterrupt):
                raise Interrupted(str(error), **left) from error
            raise
        path: Path = options.output
        return {
            "seconds": round(time.monotonic() - began, 3),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }

    def _open(self, commands: FamilyCommands, options: argparse.Namespace) -> OpenedModel:
        """The model of these options: the one that is open where it is the same."""
        source: Any = commands.source(options)
        settings = replace(source.settings, keep_model=True)
        if settings.ram_budget_gib is None:
            settings = replace(settings, ram_budget_gib=self._ram_share_gib)
        source = replace(source, settings=settings)
        key = (source, tuple(_state(path) for path in _paths(source)))
        if self._opened is None or key != self._key:
            self._close()
            self._opened = commands.open_source(source, self._progress)
            self._key = key
        return self._opened

    def _close(self) -> None:
        opened, self._opened, self._key = self._opened, None, None
        if opened is not None:
            opened.release()


@contextmanager
def _in_words(said: io.StringIO) -> Iterator[None]:
    """Errors that a user can do something about are JobErrors, with what was said before."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        words = failure(error)
        if words is None:
            raise
        kept = [line for line in said.getvalue().splitlines() if "kept in" in line][-1:]
        raise JobError("; ".join([*kept, " ".join(words.split())])) from error


def _paths(value: Any) -> Iterator[Path]:
    """The files of a source, wherever it names them."""
    if isinstance(value, Path):
        yield value
    elif is_dataclass(value):
        for each in fields(value):
            yield from _paths(getattr(value, each.name))
    elif isinstance(value, tuple):
        for each in value:
            yield from _paths(each)


def _state(path: Path) -> tuple[Any, ...]:
    """What tells a file, or a folder of shards, from what is there after somebody has changed it."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [file.stat() for file in found if file.exists()]
    return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)


def _wait_until_free(path: Path) -> None:
    """Wait for a worker of a batch that was killed, which still ends its block; of anybody else `make` speaks."""
    end = time.monotonic() + FREE_SECONDS
    while time.monotonic() < end:
        try:
            OutputLock(path).release()
            return
        except ValueError:
            time.sleep(LOOK_SECONDS)


def _left(path: Path) -> dict[str, Any]:
    with suppress(OSError):
        return {"left": file_sha256(path)}
    return {}


class _ToldLog(logging.Handler):
    """Warnings, as notes."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.say("note", {"text": f"{record.levelname}: {record.getMessage()}"})


def main() -> int:
    """Make jobs until the pipe ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ram-share", type=float)
    options = parser.parse_args()
    if sys.platform == "linux":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

    def maker(channel: Channel) -> VideoMaker:
        logging.basicConfig(level=logging.WARNING, handlers=[_ToldLog(channel)])
        return VideoMaker(channel, options.ram_share)

    with torch.inference_mode():
        return serve(maker)


if __name__ == "__main__":
    sys.exit(main())
