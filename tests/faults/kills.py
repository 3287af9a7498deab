"""`kill -9` at many points of a command, then the same command again: the same result, and no work lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .command import Ended, Fault, kill, run
from .files import Files, frames_of, left_beside, tensors_of
from .record import NOTHING, Known
from .table import Row


@dataclass(frozen=True)
class Case:
    """A command, what it makes in a folder, and how much of it is kept there.

    `kept` pieces spare `passes_each` passes of the model; `whole` says whether what is at the output's place is sound.
    """

    name: str
    words: Callable[[Path], list[str]]
    made: Callable[[Path], object]
    kept: Callable[[Path], int] = lambda folder: 0
    passes_each: int = 0
    rest: Callable[[Path], set[str]] = lambda folder: set()  # files that stay


def cases(files: Files) -> list[Case]:
    """Wan with two experts, FramePack, a conversion, and a video that is made larger."""

    def wan(folder: Path) -> list[str]:
        low = ["--model-low", files.model_low, "--boundary", 0.8]
        return files.wan(folder / "a.mp4", *low, steps=4)

    def sections(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.glob("framepack/**/*") if path.is_file()}

    return [
        Case(
            "kill: Wan, two experts",
            wan,
            lambda folder: frames_of(folder / "a.mp4"),
            lambda folder: len(list(folder.glob("wan/*/step_*.safetensors"))),
            passes_each=2,
        ),
        Case(
            "kill: FramePack",
            lambda folder: files.make_framepack(folder / "a.mp4", "--no-teacache"),
            lambda folder: (
                frames_of(folder / "a.mp4"),
                [tensors_of(path) for path in sorted(folder.glob("framepack/*/section_*.safetensors"))],
            ),
            lambda folder: len(list(folder.glob("framepack/*/section_*.safetensors"))),
            passes_each=3,
            rest=sections,
        ),
        Case(
            "kill: convert",
            lambda folder: files.convert(folder / "c.safetensors"),
            lambda folder: tensors_of(folder / "c.safetensors"),
        ),
        Case(
            "kill: upscale",
            lambda folder: files.upscale(folder / "a.mp4"),
            lambda folder: frames_of(folder / "a.mp4"),
            _kept_steps,
            passes_each=1,
        ),
    ]


def _kept_steps(folder: Path) -> int:
    """Of FlashVSR: one pass each."""
    return max((int(path.name[6:]) for path in folder.glob("upscale/*/state_????????")), default=0)


def kill_everywhere(case: Case, place: Path, points: int, known: Known = NOTHING) -> Iterator[Row]:
    """A row for each of so many points, spread over the changes of files, the passes, and the calls of functions."""
    reference = _fresh(place / "reference")
    first = run(case.words(reference), Fault(reference, "calls"))
    assert first.status == 0, first.err
    wanted = case.made(reference)
    for kind, at in points_of(first.counts, points):
        if (case.name, f"{kind} {at}") in known:
            yield known[case.name, f"{kind} {at}"]
            continue
        folder = _fresh(place / "killed")
        killed = run(case.words(folder), Fault(folder, kind, at, kill))
        kept = case.kept(folder)
        again = run(case.words(folder), Fault(folder, "passes"))
        yield _row(case, folder, f"{kind} {at}", first, killed, kept, again, case.made(folder) == wanted)


def _row(case: Case, folder: Path, where: str, first: Ended, killed: Ended, kept: int, again: Ended, same: bool) -> Row:
    made = again.counts.get("passes", 0)
    wanted = max(0, first.counts["passes"] - kept * case.passes_each)
    outputs = {path.name for path in folder.iterdir() if path.is_file() and path.suffix in (".mp4", ".safetensors")}
    left = left_beside(folder, outputs | case.rest(folder))
    outputs_left = sorted(outputs - {"a.mp4", "c.safetensors"})
    if killed.status == 0:
        seen = "it had ended"
    elif again.status != 0 and same and "exists already" in again.last_line:
        seen = "it was whole already, and is kept"
    elif again.status != 0:
        seen = f"refused: {again.last_line[:80]}"
    elif not same:
        seen = "another result"
    elif made > wanted:
        seen = f"work lost: {made - wanted} passes"
    elif left or outputs_left:
        seen = "something left behind"
    else:
        seen = "same bits, nothing lost"
    right = seen in ("same bits, nothing lost", "it was whole already, and is kept") or (killed.status == 0 and same)
    more = {"kept": kept, "passes": made, "left": left + outputs_left, "status": killed.status}
    return Row(case.name, where, right, seen, more)


def points_of(counts: dict[str, int], points: int) -> list[tuple[str, int]]:
    """Half of them changes of files, all passes that there are, and calls of functions for the rest."""
    files = spread(counts["files"], points // 2)
    passes = spread(counts["passes"], points // 6)
    calls = spread(counts["calls"], points - len(files) - len(passes))
    return [*(("files", at) for at in files), *(("passes", at) for at in passes), *(("calls", at) for at in calls)]


def spread(total: int, count: int) -> list[int]:
    """So many of 1 ... total, from the first to the last."""
    if count >= total:
        return list(range(1, total + 1))
    if count == 1:
        return [(total + 1) // 2]
    return sorted({1 + round(index * (total - 1) / max(1, count - 1)) for index in range(count)})


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
