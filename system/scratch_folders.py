"""Folders for a while, which go with their process: those of processes that were killed go at the next start."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock

PREFIX = ".lowvram-video-"
NEW_SECONDS = 60  # so long nobody takes a folder for one that was left behind: its lock may be about to come


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """A new folder in `place`, removed afterwards. OSError as the system's."""
    remove_left_behind(place)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place, ignore_cleanup_errors=True) as name:
        lock = lock_of(Path(name))
        with suppress(OSError, NotImplementedError):  # a file system without locks
            lock.acquire()
        try:
            yield Path(name)
        finally:
            lock.release()


def remove_left_behind(place: Path) -> None:
    """Delete the folders of processes that were killed: they hold gigabytes, and nobody else would."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError, NotImplementedError):  # in use, or another user's
            if time.time() - folder.stat().st_mtime >= NEW_SECONDS:
                with lock_of(folder):
                    pass
                shutil.rmtree(folder)


def lock_of(folder: Path) -> BaseFileLock:
    """Held for as long as a folder's process lives."""
    return FileLock(folder / "lock", timeout=0, thread_local=False)
