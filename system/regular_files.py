"""Files of others: only regular ones are opened, as a pipe would wait for ever and a device never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """A file for reading; OSError as the system's, and for a pipe, a socket, a device or a folder."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file but a folder, a pipe or a device", str(path))
    return open(path, "rb")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file; OSError as `open_regular`, and where it has more than `most_bytes`."""
    with open_regular(path) as file:
        whole = os.fstat(file.fileno()).st_size <= most_bytes
        data = file.read(most_bytes + 1) if whole else b""  # the system's own files say that they have none
    if not whole or len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return data


def is_there(path: Path) -> bool:
    """Whether something has this name; False too for names that no file can have."""
    return os.path.exists(path)
