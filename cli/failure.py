"""What ends a command, in words that say what to do."""

from __future__ import annotations

import errno

from ..system.device_errors import is_out_of_memory

NO_ROOM, NO_RIGHTS = (
    "free some of that disk, or choose another place",
    "check the rights there, or choose another place",
)
REMEDIES = {
    errno.ENOSPC: NO_ROOM,
    getattr(errno, "EDQUOT", errno.ENOSPC): NO_ROOM,
    errno.EACCES: NO_RIGHTS,
    errno.EPERM: NO_RIGHTS,
    errno.EROFS: NO_RIGHTS,
    errno.ENOENT: "it was there before: put it back, or choose another",
    errno.EIO: "check that disk, or choose another place",
}


def failure(error: Exception) -> str | None:
    """What to tell the user of an error; None for one that is a fault of the program's."""
    if isinstance(error, MemoryError):
        return str(error) or "out of RAM: close other programs, or give a smaller --ram-budget"
    if isinstance(error, OSError):
        return _system_error(error)
    if isinstance(error, ValueError):
        return str(error)
    if not is_out_of_memory(error):
        return None
    problem = f"the GPU ran out of memory ({str(error).splitlines()[0]})"
    return f"{problem}: close what else uses it, or make a smaller or shorter video (FramePack: --window)"


def _system_error(error: OSError) -> str:
    """In the system's words, and what to do where those do not say it."""
    if error.errno is None or error.strerror is None:  # one of ours
        return str(error)
    name = error.filename if error.filename2 is None else error.filename2
    said = f"{'a file' if name is None else name}: {error.strerror}"
    remedy = None if ": " in error.strerror else REMEDIES.get(error.errno)  # one of ours has said it
    return said if remedy is None else f"{said}: {remedy}"
