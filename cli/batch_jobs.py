"""What a jobs' file asks for: flags read, and files that two jobs would write refused, without anything started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batch.job import BadLine, Job, read_lines
from ..system.content_key import run_key
from .job_flags import JobParser, read_by, written_by

UNKEYED = ("--overwrite", "--report")  # the film is the same
NO_OUTPUT = "it has no output: name the video's file, by which the job is known when the batch goes on"


@dataclass(frozen=True)
class ReadJob:
    """A job, the files that it writes and those that it reads."""

    job: Job
    written: Iterable[Path]
    read: Iterable[Path]


JobReader = Callable[[int, Mapping[str, Any]], ReadJob]


def read_jobs(path: Path, reader: JobReader, taken: Iterable[Path]) -> tuple[list[Job], list[BadLine]]:
    """The jobs of a file, and its lines that are none: `reader` raises ValueError for those. `taken` are the batch's
    own files, which no job may write.

    ValueError for a file without any.
    """
    found: list[ReadJob] = []
    bad: list[BadLine] = []
    for line, values in read_lines(path):
        if isinstance(values, BadLine):
            bad.append(values)
            continue
        try:
            found.append(reader(line, values))
        except (ValueError, OSError) as error:
            bad.append(BadLine(line, str(error), str(values.get("output", ""))))
    if not found and not bad:
        raise ValueError(
            f"{path} has no jobs: give one JSON object a line, such as the flags of generate by their names"
        )
    clashes = list(_clashes(found, taken))
    refused = {line.line for line in clashes}
    return [each.job for each in found if each.job.line not in refused], bad + clashes


def generate_job(line: int, values: Mapping[str, Any], parser: JobParser) -> ReadJob:
    """A line of flags of `generate`. ValueError for what its parser refuses."""
    if values.get("output") is None:
        raise ValueError(NO_OUTPUT)
    words = parser.words(values)
    options = parser.parse_args(words)
    if str(options.device).startswith("cuda:"):
        raise ValueError(f"device is {options.device}: workers have a card each, so give cuda, or leave it out")
    if options.park is not None:
        raise ValueError("park: other cards have workers of their own; leave it out, or make this video by generate")
    if options.devices is not None:
        raise ValueError("devices: workers have a card each; leave it out, or make this video by generate")
    request = {
        "words": words, "device": values.get("device"), "output": str(options.output), "overwrite": options.overwrite,
    }  # fmt: skip
    job = Job(line, Path(values["output"]), _key(words), request, str(options.model))
    return ReadJob(job, written_by(options), read_by(options))


def _key(words: Iterable[str]) -> str:
    """Equal for jobs that make the same file, in whatever order their flags are, and in later versions too."""
    keyed = [[flag, value] for flag, _, value in (word.partition("=") for word in words) if flag not in UNKEYED]
    return run_key({"words": sorted(keyed, key=lambda pair: pair[0])})


def _clashes(found: Iterable[ReadJob], taken: Iterable[Path]) -> Iterable[BadLine]:
    """The jobs that write what another one, or the batch, writes or reads: which is first nobody knows."""
    found = list(found)
    writers: dict[str, int] = {}
    own = {_place(path) for path in taken}
    for each in found:
        line = each.job.line
        for path in each.written:
            place = _place(path)
            if place in own:
                yield BadLine(line, f"{path} is a file of this batch: name another one", str(each.job.output))
            elif writers.setdefault(place, line) != line:
                why = f"{path} is written by line {writers[place]} too: name another one"
                yield BadLine(line, why, str(each.job.output))
    for each in found:
        for path in each.read:
            line = writers.get(_place(path), each.job.line)
            if line != each.job.line:
                why = f"{path} is written by line {line}, and jobs run in any order: make two batches"
                yield BadLine(each.job.line, why, str(each.job.output))


def _place(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def options_reader() -> JobReader:
    """Reads lines of flags of `generate`."""
    parser = JobParser()
    return lambda line, values: generate_job(line, values, parser)


def want_cards(jobs: Iterable[Job]) -> bool | None:
    """Whether some jobs of `generate` are for a graphics card; None where it is theirs where there is one."""
    devices = {job.request["device"] for job in jobs}
    return True if "cuda" in devices else None if None in devices else False
