"""A file that this process will write: no other run writes it meanwhile, nor replaces what is there unasked."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from .atomic_files import write_file
from .bounded_json import JsonError, read_json
from .run_lock import RunLock

NOTE = "output.json"
MOST_NOTE_BYTES = 1000


class OutputLock:
    """A claim on an output file for as long as its process lives, in a folder of the user's for temporary files.

    ValueError where another run has it. What runs that were killed left beside the file is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # of the name that is written over, also where it is a link: what that leads to stays as it is
        place = os.path.normcase(path.parent.resolve() / path.name)
        name = hashlib.sha256(place.encode(errors="replace")).hexdigest()[:24]
        folder = Path(tempfile.gettempdir()) / f"lowvram-video-{_user()}"
        with suppress(OSError):  # the lock then says that it cannot be had
            folder.mkdir(mode=0o700, exist_ok=True)
        self._lock = RunLock(folder / f"{name}.lock", f"{path} is being written")
        for leftover in partial_files(path):
            with suppress(OSError):
                leftover.unlink()

    def release(self) -> None:
        """Others may write the file; calling it again does nothing."""
        self._lock.remove()


def partial_files(path: Path) -> list[Path]:
    """Files beside `path` that are parts of it by their names; see `partial_name`."""
    if not path.parent.is_dir():
        return []
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    pattern = re.compile(rf"{stem}\.[0-9a-f]{{8}}\.partial{suffix}|{stem}{suffix}\.[0-9a-f]{{8}}\.partial")
    return [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]


def note_output(folder: Path, path: Path, command: str) -> None:
    """Have a run's folder know what it has shown so far at `path`, and by which command. OSError as the system's."""
    write_file(folder / NOTE, json.dumps({"sha256": file_sha256(path), "command": command}).encode("ascii"))


def is_noted(runs: Path, path: Path, command: str) -> bool:
    """Whether a run that is kept in a folder of `runs`, and was begun by this command, wrote the file that is there."""
    with suppress(OSError):
        found = file_sha256(path)
        return any(_read_note(note) == {"sha256": found, "command": command} for note in runs.glob(f"*/{NOTE}"))
    return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. OSError as the system's."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_note(note: Path) -> object:
    try:
        return read_json(note, MOST_NOTE_BYTES)
    except (OSError, JsonError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no name for this number, as in containers
        return str(getattr(os, "getuid", lambda: 0)())
