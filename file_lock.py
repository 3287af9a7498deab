"""A file's lock, which the system drops however the process ends."""

from __future__ import annotations

import sys
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_BYTE = 2**20  # far behind any text: Windows lets nobody read a locked byte


def lock_file(file: IO[bytes]) -> None:
    """Lock an open file until it is closed, or its process ends.

    BlockingIOError or PermissionError where another holds it, another OSError where nothing can.
    """
    if sys.platform == "win32":
        file.seek(LOCK_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
