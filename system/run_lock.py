"""A lock that lasts as long as its process, with a word on who has it."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .plain_text import printable
from .regular_files import read_regular

logger = logging.getLogger(__name__)


class RunLock:
    """A lock that lasts as long as its process; who has it, and since when, is in a file beside it.

    The system drops the lock however the process ends, so a file that is left behind is simply taken over.
    Raises ValueError where another process, or another place in this one, holds it.
    """

    def __init__(self, path: Path, busy: str | None = None) -> None:
        """`busy` says what is in use where another holds it."""
        self._path = path
        self._holder = path.with_name(f"{path.name}_holder.txt")  # not in the lock: Windows lets nobody read that
        for place in (path, self._holder):
            if place.is_symlink():  # it would be written through
                place.unlink()
        self._lock = FileLock(path, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"{busy or f'the run in {path.parent} is in use'} ({self._named() or 'another process'}): wait until "
                f"that ends, or {'choose another name' if busy else 'change a setting such as the seed'}"
            ) from None
        except (OSError, NotImplementedError) as error:  # filelock's word for a file system without locks
            logger.warning(
                "%s cannot be locked (%s): do not start this run twice", path, getattr(error, "strerror", error)
            )
        if self._named():
            logger.info("%s was left by a process that has ended", path)
        with suppress(OSError):  # a full disk: the text is only for people
            self._holder.write_text(f"process {os.getpid()} since {now()}")

    def release(self) -> None:
        """Free the lock; calling it again does nothing."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._holder.unlink(missing_ok=True)
        self._lock.release()

    def remove(self) -> None:
        """Free the lock and leave no file of it; whoever opened that file meanwhile is refused, and may come again."""
        try:
            self._path.unlink()
        except OSError:  # Windows deletes nothing that is open
            self.release()
            with suppress(OSError):
                self._path.unlink()
        else:
            self.release()

    def _named(self) -> str:
        try:
            return printable(read_regular(self._holder, 1000).decode("ascii", "replace"))[:200]
        except OSError:
            return ""


def now() -> str:
    """The time as people and files have it, such as 2026-01-31T12:00:00+01:00."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
