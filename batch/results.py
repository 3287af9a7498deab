"""What became of each job, one JSON object a line: whatever ends the process, the lines before stay whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..system.output_lock import file_sha256
from ..system.run_lock import RunLock, now
from .job import Job

DONE, BEGUN, REFUSED = "made", "begun", "refused"
BEGINNING = b'{"output"'  # of every line
OURS = (BEGUN, "interrupted", "failed", "lost")  # after these a file that is there may be one that the job left


class Results:
    """A file of results that is only ever added to; a context manager that nobody else may write meanwhile.

    ValueError where it cannot be written, and where another process writes it, or it is another file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(path.with_name(f"{path.name}.lock"), f"{path} is being written by another batch")
        except OSError as error:
            raise _cannot_be_written(path, error) from error
        try:
            self._last = _read(path)
            self._file: BinaryIO = path.open("ab")
            if self._file.tell() and not _ends_a_line(path):  # a process was killed as it wrote
                self._file.write(b"\n")
        except BaseException as error:
            self._lock.remove()
            if isinstance(error, OSError):
                raise _cannot_be_written(path, error) from error
            raise

    def last(self, output: Path) -> Mapping[str, Any]:
        """The latest result of an output; empty where there is none."""
        return self._last.get(str(output), {})

    def has(self, job: Job) -> bool:
        """Whether a job was made before, by the same settings, and its file is there as it was made."""
        last = self.last(job.output)
        return last.get("status") == DONE and last.get("key") == job.key and _is(job.output, last.get("sha256"))

    def left(self, job: Job) -> bool:
        """Whether the file that is there is what this very job left when it did not end well."""
        last = self.last(job.output)
        if last.get("status") not in OURS or last.get("key") != job.key:
            return False
        # a process that died said no more
        return last["status"] in (BEGUN, "lost") or _is(job.output, last.get("left"))

    def add(self, output: Path | str, status: str, **values: Any) -> None:
        """Add a line, on the disk when this returns. OSError as the system's."""
        record = {"output": str(output), "status": status, "time": now(), **values}
        self._file.write(json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if status != REFUSED:  # says nothing of what another line has made there
            self._last[str(output)] = record

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # which writes once more on a full disk
            if self.path.is_file() and not self.path.stat().st_size:  # nothing was begun, and nothing ever was
                self.path.unlink()
        finally:
            self._lock.remove()


def _is(path: Path, sha256: Any) -> bool:
    """Whether a file is there, and has what was noted."""
    try:
        return file_sha256(path) == sha256
    except OSError:
        return False


def _cannot_be_written(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written ({error.strerror}): give another --results")


def _read(path: Path) -> dict[str, Mapping[str, Any]]:
    """The latest whole line of each output."""
    last: dict[str, Mapping[str, Any]] = {}
    if not path.exists():
        return last
    data = path.read_bytes()
    first = data.partition(b"\n")[0]  # it may be half a line too
    if data and not (first and first.startswith(BEGINNING[: len(first)])):
        raise ValueError(f"{path} is no file of results, and nothing is added to it: give another --results")
    for line in data.split(b"\n"):
        with suppress(ValueError, RecursionError):  # half a line of a process that was killed
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("output"), str) and record.get("status") != REFUSED:
                last[record["output"]] = record
    return last


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
