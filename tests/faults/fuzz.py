"""Damaged and hostile files through every reader: each is refused in one line, soon, and in little memory.

    python -m tests.faults.fuzz [--files 100000] [--readers "step record" ...] [--out fuzz.json]
    python -m tests.faults.fuzz --one "Wan" 17        what that file did, with its traceback
    python -m tests.faults.fuzz --together A.json B.json --out fuzz.json      runs over files of other numbers, as one

A case is a reader and a number, from which all of it follows. Cases run in processes of their own, some hundred in
each: one that hangs or dies is told, and the rest goes on in another.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import safetensors
import torch
from lowvram_video.system.atomic_files import write_file

from .command import METHOD
from .files import Files, make_files
from .reader import NonFinite, Reader
from .readers import readers

HANG_SECONDS, MOST_BYTES = 5.0, 100 * 2**20
WAITING = 6.0  # times as long a busy machine may take as it computes
BATCH = 1000  # cases in a process
FINE = ("refused", "accepted")
MODELS = ("Wan", "FramePack", "GGUF", "VACE module", "GGUF of Wan", "tiny decoder", "jobs")
SLOW = (
    "Wan VAE", "Hunyuan VAE", "LoRA for Wan", "LoRA for FramePack", "shards", "adapter_config.json", "video",
    "FlashVSR", "FlashVSR's projection", "FlashVSR's decoder", "FlashVSR's prompt", "FlashVSR's kept run",
)  # fmt: skip

Case = tuple[str, int]


@dataclass(frozen=True)
class Finding:
    """What one reader made of one file; `kind` is one of FINE, or what is wrong."""

    reader: str
    number: int
    kind: str
    detail: str = ""
    seconds: float = 0.0
    mib: float = 0.0


def fuzz(files: Files, place: Path, cases: Sequence[Case]) -> Iterator[Finding]:
    """Findings of all cases, as they are made."""
    found, left = readers(files, place / "made"), list(cases)
    context = multiprocessing.get_context(METHOD)
    while left:
        here, there = context.Pipe(duplex=False)
        given = (found if METHOD == "fork" else None, files, place, left[:BATCH], there)
        worker = context.Process(target=_work, args=given, daemon=True)
        worker.start()
        there.close()
        done = yield from _watched(worker, here, left[:BATCH])
        left = left[done:]


def _watched(worker: Any, findings: Connection, cases: Sequence[Case]) -> Iterator[Finding]:
    """What a process finds; returns how many cases it is through with, the one that it hung or died at included."""
    done, begun = 0, 0
    while done < len(cases):
        try:
            if not (_answers(worker, findings) if begun > done else findings.poll(60)):
                kind = "hang"
                break
            said = findings.recv()
        except (EOFError, ConnectionResetError):
            kind = "died"
            break
        if said == "begun":
            begun = done + 1
        elif said == "done":
            done += 1
        else:
            yield said
    else:
        worker.join(10)
        return done
    worker.kill()
    worker.join()
    name, number = cases[done]
    yield Finding(name, number, kind, f"exit code {worker.exitcode}")
    return done + 1


def _answers(worker: Any, findings: Connection) -> bool:
    """Whether a process says something before it has computed for too long, or waited for much longer."""
    process, waited = psutil.Process(worker.pid), 0.0
    before = sum(process.cpu_times()[:2])
    while waited < WAITING * HANG_SECONDS:
        if findings.poll(1.0):
            return True
        waited += 1.0
        with suppress(psutil.Error):
            if sum(process.cpu_times()[:2]) - before > HANG_SECONDS:
                return False
    return False


def _work(known: Any, files: Files, place: Path, cases: Sequence[Case], findings: Connection) -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    found = known or readers(files, place / "made")
    gc.collect()
    gc.freeze()  # what was there before is looked at no more, and shared with the process that began this one
    for index, (name, number) in enumerate(cases):
        findings.send("begun")
        for finding in run_case(name, number, found[name], place):
            findings.send(finding)
        findings.send("done")
        if index % 50 == 49:
            gc.collect()
    findings.close()


def run_case(name: str, number: int, reader: Reader, place: Path) -> Iterator[Finding]:
    """One file through all that read it."""
    draw = random.Random(f"{name} {number}")
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as folder:
        path = reader.make(Path(folder), draw)
        for index, read in enumerate(reader.reads):
            _forget_peak()
            before, began = _peak_bytes(), (time.process_time(), time.monotonic())
            kind, detail = _outcome(read, path, Path(folder))
            seconds = max(time.process_time() - began[0], (time.monotonic() - began[1]) / WAITING)
            grown = _peak_bytes() - before
            if kind == "accepted" and index == 0 and path.suffix == ".safetensors" and path.is_file():
                kind, detail = _official(path)
            if kind in FINE and seconds > HANG_SECONDS:
                kind, detail = "slow", f"{seconds:.1f} s: {detail}"
            if kind in FINE and grown > MOST_BYTES:
                kind, detail = "memory", f"{grown / 2**20:.0f} MiB: {detail}"
            yield Finding(name, number, kind, detail[:300], round(seconds, 3), round(grown / 2**20, 1))


def _outcome(read: Any, path: Path, folder: Path) -> tuple[str, str]:
    try:
        read(path)
    except NonFinite as error:
        return "wrong as right", str(error)
    except (ValueError, OSError) as error:
        said = str(error)
        if "\n" in said.strip() or any(ord(letter) < 32 for letter in said):
            return "no single line", repr(said)
        named = str(folder) in said or path.name in said
        return ("refused", said) if named else ("names no file", f"{type(error).__name__}: {said} {_place(error)}")
    except Exception as error:  # noqa: BLE001 - every other one would be a traceback
        return "traceback", f"{type(error).__name__}: {str(error)[:150]} {_place(error)}"
    return "accepted", ""


def _place(error: BaseException) -> str:
    """Where in the pack it was raised."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not {"tests", "site-packages", "lib"} & set(path.parts):
            return f"({path.parent.name}/{path.name}:{frame.lineno})"
    return ""


def _official(path: Path) -> tuple[str, str]:
    """Whether the safetensors library takes it too."""
    try:
        with safetensors.safe_open(path, "pt"):
            return "accepted", ""
    except Exception as error:  # noqa: BLE001 - its own kinds
        return "accepted, safetensors refuses", str(error)[:200]


def _forget_peak() -> None:
    """On Linux: the largest size of this process begins anew."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


# --- the command -----------------------------------------------------------------------------------------


def all_cases(names: Sequence[str], count: int, first: int = 0) -> list[Case]:
    """So many files in all: fewer of readers that build a whole model, as they take ten times as long."""
    weighted = [name for name in names for _ in range(1 if name in SLOW else 2 if name in MODELS else 4)]
    draw, numbers = random.Random(first), Counter[str]()
    cases = []
    for index in range(count):
        name = weighted[index % len(weighted)]
        cases.append((name, first + numbers[name]))
        numbers[name] += 1
    draw.shuffle(cases)
    return cases


def summary(findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    """Counts by reader and kind, and examples of what is wrong."""
    by_reader: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        by_reader[finding.reader][finding.kind] += 1
        if finding.kind not in FINE:
            wrong[finding.reader, finding.kind, finding.detail.rpartition("(")[2]].append(finding)
    return {
        "files": len({(finding.reader, finding.number) for finding in findings}),
        "readings": len(findings),
        "seconds": round(seconds),
        "kinds": dict(Counter(finding.kind for finding in findings).most_common()),
        "most_mib": max((finding.mib for finding in findings), default=0),
        "most_seconds": max((finding.seconds for finding in findings), default=0),
        "readers": {name: dict(counts) for name, counts in by_reader.items()},
        "wrong": [
            {"reader": reader, "kind": kind, "count": len(of), "example": asdict(of[0])}
            for (reader, kind, _), of in sorted(wrong.items(), key=lambda item: -len(item[1]))
        ],
    }


def together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one; their files must be of other numbers (`--first`)."""
    by_reader: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        for name, counts in result["readers"].items():
            by_reader[name].update(counts)
    sums = {key: sum(result[key] for result in results) for key in ("files", "readings", "seconds")}
    most = {key: max(result[key] for result in results) for key in ("most_mib", "most_seconds")}
    kinds = sum((Counter(result["kinds"]) for result in results), Counter[str]())
    return {
        **sums,
        "kinds": dict(kinds.most_common()),
        **most,
        "readers": {name: dict(counts) for name, counts in by_reader.items()},
        "wrong": [row for result in results for row in result["wrong"]],
    }


def show_one(files: Files, place: Path, name: str, number: int) -> None:
    """What one file did, with the whole traceback, and where its files are left to look at."""
    reader, folder = readers(files, place / "made")[name], place / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = reader.make(folder, random.Random(f"{name} {number}"))
    for read in reader.reads:
        try:
            read(path)
            print("accepted")
        except Exception:  # noqa: BLE001
            traceback.print_exc()
    print(sorted(folder.rglob("*")))


def keep(out: Path | None, result: dict[str, Any]) -> None:
    """What is known so far: a run of hours may be cut off."""
    if out is not None:
        machine = {"system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}
        write_file(out, json.dumps({"machine": machine, **result}, indent=1).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file of each reader")
    parser.add_argument("--readers", nargs="+")
    parser.add_argument("--one", nargs=2, metavar=("READER", "NUMBER"))
    parser.add_argument("--together", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.together:
        keep(options.out, together([json.loads(path.read_text(encoding="utf-8")) for path in options.together]))
        return
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = make_files(place / "files")
        if options.one:
            show_one(files, Path(tempfile.mkdtemp()), options.one[0], int(options.one[1]))
            return
        names = options.readers or list(readers(files, place / "made"))
        began, found = time.monotonic(), []
        for finding in fuzz(files, place, all_cases(names, options.files, options.first)):
            found.append(finding)
            if len(found) % 5000 == 0:
                print(f"{len(found)} readings, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                keep(options.out, summary(found, time.monotonic() - began))
    result = summary(found, time.monotonic() - began)
    keep(options.out, result)
    for row in result["wrong"]:
        example = row["example"]
        print(f"{row['count']:6} {row['reader']}: {row['kind']}: {example['number']} {example['detail'][:200]}")
    print({name: result[name] for name in ("files", "readings", "seconds", "kinds", "most_mib", "most_seconds")})


if __name__ == "__main__":
    main()
