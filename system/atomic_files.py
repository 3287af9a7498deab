"""Files that are there whole or not at all, whatever ends the process meanwhile."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# seconds; elsewhere a refusal does not pass
REPLACE_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8) if sys.platform == "win32" else ()


MAX_NAME_BYTES = 255  # of most file systems


def name_beside(path: Path, ending: str) -> Path:
    """Where something lies for a while beside `path`: its name and an ending, shortened where it may not be so long."""
    name = path.name
    if len(os.fsencode(name + ending)) <= MAX_NAME_BYTES:
        return path.with_name(name + ending)
    ending = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}{ending}"
    while len(os.fsencode(name + ending)) > MAX_NAME_BYTES:
        name = name[:-1]
    return path.with_name(name + ending)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of the system name the file: those of writing, on a full disk say, do not as those of opening do."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write `path` so that it holds the old bytes or the new ones, whole, at any moment. OSError as the system's."""
    partial = partial_name(path)
    try:
        with naming(path), partial.open("xb") as file:  # never through a link that somebody has put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path, ending: str = "") -> Path:
    """A name that no other process has, for what becomes `path`; `ending` is one that programs look at, as ".mp4"."""
    base = path.with_name(path.stem) if ending else path
    return name_beside(base, f".{secrets.token_hex(4)}.partial{ending}")


def replace_file(source: Path, target: Path) -> None:
    """Move `source` over `target`, lasting: the folder is written too where the system can."""
    for pause in (*REPLACE_PAUSES, None):
        try:
            os.replace(source, target)
            break
        except PermissionError:  # on Windows, while a virus scanner or a player has it open
            if pause is None:
                raise
            time.sleep(pause)
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):  # some file systems refuse it, and lose no more than the latest file without
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
