"""How long runs that were stopped are kept: a fortnight after they were last used, and no more than 32 of them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..system.atomic_files import write_file
from ..system.run_lock import RunLock

KEPT_SECONDS = 14 * 24 * 3600
MOST_RUNS = 32
MARK = "run.json"  # its time is when the run was last used; a folder without is nobody's business here

LOCKS = {"lock", "lock_holder.txt"}
NEW_SECONDS = 60  # so long nobody takes a folder for a remainder: its mark may be about to come


def mark_used(folder: Path, description: Mapping[str, str]) -> None:
    """Note that a run is used now, with a few words for people. OSError as the system's."""
    write_file(folder / MARK, json.dumps(description, indent=1).encode("ascii"))


def clean_runs(root: Path) -> None:
    """Remove the runs that are older, or more, than are kept; those in use, and all that is no run, stay."""
    runs = [folder for folder in root.iterdir() if re.fullmatch("[0-9a-f]{16}", folder.name) and folder.is_dir()]
    for folder in filter(_is_remainder, runs):
        _remove(folder)
    used = sorted(((_used(folder), folder) for folder in runs if (folder / MARK).is_file()), reverse=True)
    for number, (seconds, folder) in enumerate(used):
        if number >= MOST_RUNS or time.time() - seconds > KEPT_SECONDS:
            _remove(folder)


def remove_run(folder: Path, lock: RunLock) -> None:
    """Delete a run whose lock is held here; the lock goes last, so that nobody begins in a folder that goes."""
    # what says that it is a run goes after all else: one that is killed here is found again
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARK):
        if path.name.startswith("lock"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(OSError):
            path.unlink()
    lock.remove()
    with suppress(OSError):  # somebody has begun in it
        folder.rmdir()


def _is_remainder(folder: Path) -> bool:
    """Whether it was being removed when its process was killed: only the lock is there."""
    names = {path.name for path in folder.iterdir()}
    return bool(names) and names <= LOCKS and time.time() - folder.stat().st_mtime > NEW_SECONDS


def _remove(folder: Path) -> None:
    with suppress(ValueError, OSError):  # in use, or gone meanwhile
        remove_run(folder, RunLock(folder / "lock"))


def _used(folder: Path) -> float:
    with suppress(OSError):
        return (folder / MARK).stat().st_mtime
    return 0.0
