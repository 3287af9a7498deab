"""Disks that are full, folders that cannot be written or go, model files that change: one line, and nothing lost.

Where tmpfs can be mounted (Linux, root) disks are really full and read-only; elsewhere the first change that would not
succeed is refused as the system does it.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .command import Action, Ended, Fault, delete, exchange, fill, on, overwrite, run, truncate, unlink
from .files import Files, frames_of
from .kills import Case, cases, spread
from .table import Row

Words = Callable[[Path], list[str]]


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[bool]:
    """A disk of its own at `place`; False where none can be mounted: then it is an ordinary folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def _mount(*words: str) -> bool:
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


def full_disks(files: Files, place: Path, points: int) -> Iterator[Row]:
    """The disk is full from the n-th change of a file on; freed, the same command goes on to the same video."""
    for case in cases(files):
        if case.name.endswith("convert"):
            continue
        reference = place / "reference"
        shutil.rmtree(reference, ignore_errors=True)
        reference.mkdir(parents=True)
        first = run(case.words(reference), Fault(reference))
        wanted = case.made(reference)
        name = case.name.replace("kill", "disk full")
        for at in spread(first.counts["files"], points):
            with small_disk(place / "disk", "12m") as real:
                folder = place / "disk"
                fault = Fault(folder, "files", at, fill) if real else Fault(folder, "files", at, refuse=errno.ENOSPC)
                ended = run(case.words(folder), fault)
                kept = case.kept(folder)
                (folder / "filler").unlink(missing_ok=True)
                yield _gone_on(name, f"change {at}", case, folder, ended, kept, first, wanted)


def broken_folders(files: Files, place: Path) -> Iterator[Row]:
    """Folders that are read-only from the start, from some change on, or deleted meanwhile."""
    for case in cases(files):
        what = case.name.split(":")[1].strip()
        with small_disk(place / "disk", "12m") as real:
            folder = place / "disk"
            real = real and _mount("-o", "remount,ro", str(folder))
            ended = run(case.words(folder), None if real else Fault(folder, "files", 1, refuse=errno.EROFS))
            yield _one_line("read-only folder", what, ended)
        for at in (3, 8):
            folder = place / "folder"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            ended = run(case.words(folder), Fault(folder, "files", at, refuse=errno.EACCES))
            yield _one_line("folder without rights in mid-run", f"{what}, change {at}", ended)
        folder = place / "folder"
        for at in (2, 6):
            folder.mkdir(parents=True, exist_ok=True)
            ended = run(case.words(folder), Fault(folder, "files", at, delete))
            yield _one_line("output folder deleted in mid-run", f"{what}, change {at}", ended)


@dataclass(frozen=True)
class Change:
    """What happens to a model file, by its name here."""

    name: str
    action: Callable[[Path, Path], Action]  # of the file, and another one


CHANGES = (
    Change("truncated", lambda path, other: on(path, truncate)),
    Change("deleted", lambda path, other: on(path, unlink)),
    Change("replaced", lambda path, other: on(path, exchange, other)),
    Change("overwritten in place", lambda path, other: on(path, overwrite, other)),
)


def changed_models(files: Files, place: Path) -> Iterator[Row]:
    """A model that streams from the disk changes in mid-run: the right video, or one line; never a wrong video."""
    model = place / "model.safetensors"

    def words(output: Path) -> list[str]:
        return files.wan(output, "--ram-budget", "1.58", "--no-resume", model=model, frames=5, steps=4)

    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(files.large, model)
    first = run(words(place / "reference.mp4"), Fault(place, "passes"))
    assert first.status == 0, first.err
    wanted = frames_of(place / "reference.mp4")
    for change in CHANGES:
        for at in spread(first.counts["passes"], 3):
            (place / "a.mp4").unlink(missing_ok=True)
            shutil.copy(files.large, model)
            fault = Fault(place, "passes", at, change.action(model, files.other_large))
            ended = run(words(place / "a.mp4"), fault)
            yield _right_or_refused(f"model file {change.name} in mid-run", f"pass {at}", ended, place, wanted)


def _right_or_refused(fault: str, where: str, ended: Ended, folder: Path, wanted: object) -> Row:
    right_video = frames_of(folder / "a.mp4") == wanted
    seen = "same frames" if ended.status == 0 and right_video else "refused in one line"
    if ended.status == 0 and not right_video:
        seen = "A WRONG VIDEO"
    elif ended.status != 0 and not ended.one_line:
        seen = f"not in one line: {ended.last_line[:80]}"
    return Row(fault, where, seen in ("same frames", "refused in one line"), seen, {"last": ended.last_line[-200:]})


def _one_line(fault: str, where: str, ended: Ended) -> Row:
    """A run that cannot succeed, or succeeds in spite of it."""
    seen = "made all the same" if ended.status == 0 else "refused in one line"
    if ended.status is None:
        seen = "HUNG"
    elif ended.status != 0 and not ended.one_line:
        seen = f"not in one line: {ended.last_line[:80]}"
    right = seen in ("made all the same", "refused in one line")
    return Row(fault, where, right, seen, {"last": ended.last_line[-200:], "status": ended.status})


def _gone_on(
    fault: str, where: str, case: Case, folder: Path, ended: Ended, kept: int, first: Ended, wanted: object
) -> Row:
    again = run(case.words(folder), Fault(folder, "passes"))
    made, spared = again.counts.get("passes", 0), kept * case.passes_each
    seen = "went on to the same bits" if ended.status != 0 else "made all the same"
    if ended.status is None or (ended.status != 0 and not ended.one_line):
        seen = f"not in one line: {ended.last_line[:80]}"
    elif case.made(folder) != wanted:
        seen = f"another result: {again.last_line[:60]}"
    elif ended.status != 0 and made > first.counts["passes"] - spared:
        seen = "work lost"
    right = seen in ("went on to the same bits", "made all the same")
    return Row(fault, where, right, seen, {"kept": kept, "passes": made, "last": ended.last_line[-200:]})
