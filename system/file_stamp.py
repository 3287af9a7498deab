"""Whether a file is still the one that it was: by its size and its time of change."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int]  # size, time of change in nanoseconds


def stamp_of(file: Path) -> Stamp | None:
    """Size and time of change of a file; None where it is not there."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def change_of(file: Path, stamp: Stamp | None) -> str | None:
    """What became of a file that had this stamp, "deleted" or "changed"; None where it is still that one."""
    now = stamp_of(file)
    if now == stamp:
        return None
    return "deleted" if now is None else "changed"
