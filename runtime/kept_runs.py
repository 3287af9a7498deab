"""How long runs that were stopped are kept: a fortnight after they were last used, and no more than 32 of them."""

from __future__ import annotations

import json
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from ..system.atomic_files import write_file
from ..system.run_lock import RunLock, now

KEPT_SECONDS = 14 * 24 * 3600
MOST_RUNS = 32
MARK = "run.json"  # its time is when the run was last used; a folder without is nobody's business here

UNSOUND = "unsound.json"  # why what a run made was no use: it goes on on the safe path
MOST_TRIES = 50

LOCKS = {"lock", "lock_holder.txt"}
NEW_SECONDS = 60  # so long nobody takes a folder for a remainder: its mark may be about to come


def open_run(root: Path, key: str) -> tuple[Path, RunLock]:
    """The folder of the run of this key, `root/<its first 16 letters>`, made, held, and marked as used now.

    What other runs left long ago is removed. ValueError where it cannot be written, or another process works on it.
    """
    folder = root / key[:16]
    try:
        _make(folder)
        lock = RunLock(folder / "lock")
        try:
            write_file(folder / MARK, json.dumps({"key": key, "used": now()}, indent=1).encode("ascii"))
            clean_runs(root)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise ValueError(
            f"the run's folder {folder} cannot be written ({error.strerror or error}): check the free space and the "
            "rights, choose another folder, or keep nothing"
        ) from error
    return folder, lock


def end_run(folder: Path, lock: RunLock) -> None:
    """As `remove_run`, and the root too where no other run is in it."""
    remove_run(folder, lock)
    with suppress(OSError):
        folder.parent.rmdir()


def give_up(folder: Path, reason: str) -> None:
    """Have what the run made be no use from now on, whenever it is begun again."""
    with suppress(OSError):  # a full disk: begun again it finds out by itself
        write_file(folder / UNSOUND, json.dumps({"reason": reason}).encode("ascii"))


def is_given_up(folder: Path) -> bool:
    return (folder / UNSOUND).exists()


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


def _make(folder: Path) -> None:
    """A folder and its root, which other runs remove when they end and it is empty. OSError as the system's."""
    for _ in range(MOST_TRIES):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            return
    folder.mkdir(parents=True, exist_ok=True)


def _is_remainder(folder: Path) -> bool:
    """Whether it was being removed when its process was killed: only the lock is there."""
    with suppress(OSError):  # its process lives, and has removed it meanwhile
        names = {path.name for path in folder.iterdir()}
        return bool(names) and names <= LOCKS and time.time() - folder.stat().st_mtime > NEW_SECONDS
    return False


def _remove(folder: Path) -> None:
    with suppress(ValueError, OSError):  # in use, or gone meanwhile
        remove_run(folder, RunLock(folder / "lock"))


def _used(folder: Path) -> float:
    with suppress(OSError):
        return (folder / MARK).stat().st_mtime
    return 0.0
