"""Folders of files that other processes make and delete meanwhile."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


def folders_in(folder: Path) -> list[Path]:
    """The folders in one, links left out; none where it cannot be read."""
    return [Path(entry.path) for entry in _entries(folder) if _is_folder(entry)]


def files_in(folder: Path, ending: str) -> list[Path]:
    """The files in a folder whose names end so; none where it cannot be read."""
    return [Path(entry.path) for entry in _entries(folder) if entry.name.endswith(ending) and not _is_folder(entry)]


def file_bytes(path: Path) -> int:
    """Of one file; 0 where it has gone."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what goes meanwhile counts nothing."""
    return sum(file_bytes(Path(place) / name) for place, _, names in os.walk(folder) for name in names)


def delete(folder: Path) -> int:
    """Delete a folder; the bytes that are gone."""
    before = tree_bytes(folder)
    shutil.rmtree(folder, ignore_errors=True)  # another process may use it, or delete it too
    return before - tree_bytes(folder)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """By name."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
    return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, and no link to one."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False
