"""Ctrl-C and SIGTERM at many points, and two runs at once: exit code 130, one line, nothing of anybody's lost.

Not at the first and the last call of our functions: what comes before and after the command is Python's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .command import Ended, Fault, interrupt, run, start, terminate, wait
from .files import Files, frames_of, tensors_of
from .kills import Case, cases, points_of
from .table import Row

INTERRUPTED = 130


def interrupts(files: Files, place: Path, points: int) -> Iterator[Row]:
    """At each of so many points of each command, by turns with both signals; then the same command again."""
    for case in cases(files):
        reference = _fresh(place / "reference")
        first = run(case.words(reference), Fault(reference, "calls"))
        wanted = case.made(reference)
        struck = [point for point in points_of(first.counts, points) if point[1] < first.counts[point[0]]]
        for number, (kind, at) in enumerate(struck):
            folder = _fresh(place / "stopped")
            ended = run(case.words(folder), Fault(folder, kind, at, (interrupt, terminate)[number % 2]))
            kept = case.kept(folder)
            again = run(case.words(folder), Fault(folder, "passes"))
            yield _stopped(case, f"{kind} {at}", first, ended, kept, again, case.made(folder) == wanted)


def _stopped(case: Case, where: str, first: Ended, ended: Ended, kept: int, again: Ended, same: bool) -> Row:
    spared = kept * case.passes_each
    if ended.status == 0:
        seen = "it had ended"
    elif where == "calls 1" and again.status == 0 and same:
        seen = "ended before anything began"
    elif ended.status != INTERRUPTED or not ended.one_line:
        seen = f"exit code {ended.status}: {ended.last_line[:80]}"
    elif same and "exists already" in again.last_line:
        seen = "130, one line, it was whole already"
    elif again.status != 0 or not same:
        seen = f"did not go on: {again.last_line[:80]}"
    elif again.counts["passes"] > first.counts["passes"] - spared:
        seen = "work lost"
    else:
        seen = "130, one line, same bits afterwards"
    right = seen.startswith(("130", "ended before")) or (ended.status == 0 and same)
    name = case.name.replace("kill", "Ctrl-C, SIGTERM")
    return Row(name, where, right, seen, {"kept": kept, "said": ended.last_line[-200:]})


def two_at_once(files: Files, place: Path, repeats: int) -> Iterator[Row]:
    """Two commands of one output, or of one run: one makes its own, the other one is told so or has another name."""
    wan = [["--seed", "1"], ["--seed", "2"]]
    for number in range(repeats):
        folder = _fresh(place / "two")
        words = [files.wan(folder / "a.mp4", *more, frames=17) for more in wan]
        alone = [_alone(files.wan(folder / f"alone_{index}.mp4", *more, frames=17)) for index, more in enumerate(wan)]
        yield _of_two("two at once: one output", f"Wan {number}", *_both(words), frames_of(folder / "a.mp4"), alone)
        folder = _fresh(place / "two")
        words = [files.make_framepack(folder / "a.mp4")] * 2
        alone = [_alone(files.make_framepack(folder / "alone.mp4", "--runs", folder / "others"))]
        yield _of_two("two at once: one run", f"FramePack {number}", *_both(words), frames_of(folder / "a.mp4"), alone)
        folder = _fresh(place / "two")
        words = [files.upscale(folder / name, "--runs", folder / "runs") for name in ("a.mp4", "b.mp4")]
        alone = [_alone(files.upscale(folder / "alone.mp4", "--no-resume"))]
        ended = _both(words)
        (made,) = (frames_of(path) for path in (folder / "a.mp4", folder / "b.mp4") if path.exists())
        yield _of_two("two at once: one run", f"upscale {number}", *ended, made, alone)
        folder = _fresh(place / "two")
        words = [files.convert(folder / "c.safetensors", kind) for kind in ("fp8", "int8")]
        made = [files.convert(folder / f"{kind}.safetensors", kind) for kind in ("fp8", "int8")]
        for each in made:
            assert run(each).status == 0
        wanted = [tensors_of(folder / f"{kind}.safetensors") for kind in ("fp8", "int8")]
        ended = _both(words)
        yield _of_two(
            "two at once: one target", f"convert {number}", *ended, tensors_of(folder / "c.safetensors"), wanted
        )
        yield _default_names(files, _fresh(place / "two"), number)


def _default_names(files: Files, folder: Path, number: int) -> Row:
    """Without -o both have a name."""
    words = []
    for seed in (1, 2):
        each = files.wan(folder, "--seed", seed, "--no-resume", frames=17)
        at = each.index("--output")
        words.append(each[:at] + each[at + 2 :])
    one, other = _both(words, folder)
    videos = {frames_of(path)[0] for path in folder.glob("output/*.mp4")}
    right = one.status == other.status == 0 and len(videos) == 2
    return Row("two at once: default names", f"Wan {number}", right, "both kept" if right else "ONE LOST")


def _of_two(fault: str, where: str, one: Ended, other: Ended, made: object, wanted: list[object]) -> Row:
    ended = [one, other]
    winners = [each for each in ended if each.status == 0]
    losers = [each for each in ended if each.status != 0]
    if made not in wanted:
        seen = "A MIXTURE, or nothing"
    elif len(winners) == 1 and losers[0].one_line:
        seen = "one made it, the other was told"
    elif len(winners) == 2 and len(wanted) == 1:
        seen = "one after the other, the same"
    else:
        seen = f"{len(winners)} made it: {[each.last_line[:60] for each in losers]}"
    right = seen.startswith("one")
    return Row(fault, where, right, seen, {"said": [each.last_line[-200:] for each in losers]})


def _both(words: list[list[str]], cwd: Path | None = None) -> tuple[Ended, Ended]:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        places = Path(one), Path(other)
        running = [start(each, place, cwd=cwd) for each, place in zip(words, places, strict=True)]
        ended = [wait(process, place) for process, place in zip(running, places, strict=True)]
    return ended[0], ended[1]


def _alone(words: list[str]) -> object:
    ended = run(words)
    assert ended.status == 0, ended.err
    return frames_of(Path(words[words.index("--output") + 1]))


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
