"""`lowvram-video batch`: many videos, made by the workers of this machine, of a Ray cluster or of ComfyUI servers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from ..batch.dispatch import Dispatcher, Event
from ..batch.job import BadLine, Job
from ..batch.results import BEGUN, REFUSED, Results
from .batch_crew import add_crew, crew_for, reader_for
from .batch_jobs import read_jobs
from .batch_progress import BatchProgress

SOME_FAILED = 1
RETRIES = 2


def add_batch(parser: argparse.ArgumentParser) -> None:
    """The flags of `batch`."""
    parser.add_argument("jobs", type=Path, help="one JSON object a line: flags of generate by their names")
    parser.add_argument(
        "--keep-going", action="store_true",
        help="make the other jobs where some cannot be made (left out: nothing begins where one is refused, and no job "
        "begins after one failed)",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, metavar="FILE",
        help="what became of each job, as JSON, a line each; the same batch goes on by it (JOBS.results.jsonl)",
    )  # fmt: skip
    parser.add_argument(
        "--retries", type=int, default=RETRIES, metavar="N",
        help=f"how often a job begins anew whose worker was lost ({RETRIES})",
    )  # fmt: skip
    add_crew(parser)
    parser.set_defaults(command=batch)


def batch(options: argparse.Namespace) -> int:
    """Make all jobs that are not made yet; 1 where some failed. ValueError where nothing was begun."""
    if options.retries < 0:
        raise ValueError(f"--retries is {options.retries}: give 0 or more")
    if options.jobs.is_dir():
        raise ValueError(f"{options.jobs} is a folder: give a file with one JSON object a line, the flags of generate")
    results_path: Path = options.results or options.jobs.with_suffix(".results.jsonl")
    with Results(results_path) as results:
        jobs, bad = read_jobs(options.jobs, reader_for(options), (options.jobs, results_path))
        if bad and not options.keep_going:
            _refuse(options.jobs, bad, len(jobs))
        wanted = [job for job in jobs if not results.has(job)]
        if len(wanted) < len(jobs):
            print(f"{len(jobs) - len(wanted)} of {len(jobs)} jobs were made before")
        return _Batch(options, results, wanted, bad).run()


def _refuse(path: Path, bad: Sequence[BadLine], num_good: int) -> NoReturn:
    for line in sorted(bad, key=lambda each: each.line):
        print(f"{path}, line {line.line}: {line.reason}", file=sys.stderr)
    raise ValueError(
        f"{len(bad)} of {len(bad) + num_good} jobs cannot be made, and nothing was begun: mend them, or give "
        "--keep-going to make the others"
    )


class _Batch:
    """Jobs on their way: checked, made, and what became of them written down."""

    def __init__(
        self, options: argparse.Namespace, results: Results, jobs: Sequence[Job], bad: Sequence[BadLine]
    ) -> None:
        self.options, self.results, self.jobs, self.bad = options, results, jobs, list(bad)
        self.num_made = self.num_failed = 0
        self.is_making = False
        self.progress = BatchProgress(sys.stderr, len(jobs))

    def run(self) -> int:
        """Check, refuse, make; the command's exit status."""
        if self.jobs:
            with Dispatcher(crew_for(self.options, self.jobs), self.options.retries) as dispatcher:
                try:
                    good = self._check(dispatcher)
                    self._write_refused()
                    self._make(dispatcher, good)
                except KeyboardInterrupt:
                    told = dispatcher.stop()
                    self._write(told if self.is_making else [])  # checks make nothing
                    said = f"{self.num_made} of {len(self.jobs)} jobs are made; the same command goes on from there"
                    raise KeyboardInterrupt(f"interrupted: {said}") from None
                finally:
                    self.progress.close()
        else:
            self._write_refused()
        num_failed = self.num_failed + len(self.bad)
        print(f"{self.num_made} made, {num_failed} failed: {self.results.path}")
        return SOME_FAILED if num_failed else 0

    def _check(self, dispatcher: Dispatcher) -> list[Job]:
        """The jobs that can be made. ValueError where all must."""
        asked = [_as_own(job, self.results) for job in self.jobs]
        good: list[Job] = []
        with closing(dispatcher.spread("check", asked)) as events:
            for event in events:
                self.progress.show("checking", dispatcher)
                if event is not None and event.kind == "checked":
                    good.append(event.job)
                elif event is not None and event.kind == "failed":
                    self.bad.append(BadLine(event.job.line, str(event.values["error"]), str(event.job.output)))
                if event is not None and event.kind in ("checked", "failed"):
                    self.progress.advance()
        self.progress.restart()
        if self.bad and not self.options.keep_going:
            self.progress.close()
            _refuse(self.options.jobs, self.bad, len(good))
        return sorted(good, key=lambda job: job.line)

    def _write_refused(self) -> None:
        for line in sorted(self.bad, key=lambda each: each.line):
            print(f"{self.options.jobs}, line {line.line}: {line.reason}", file=sys.stderr)
            self.results.add(line.output, REFUSED, line=line.line, error=line.reason)

    def _make(self, dispatcher: Dispatcher, jobs: Sequence[Job]) -> None:
        self.is_making = True
        with closing(dispatcher.spread("make", jobs)) as events:
            for event in events:
                self.progress.show("making", dispatcher)
                if event is None:
                    continue
                self._write([event])
                if event.kind == "failed" and not self.options.keep_going:
                    dispatcher.hold()

    def _write(self, events: Sequence[Event]) -> None:
        for event in events:
            self.results.add(
                event.job.output,
                BEGUN if event.kind == "begun" else event.kind,
                line=event.job.line,
                key=event.job.key,
                worker=event.worker,
                attempt=event.attempt,
                **event.values,
            )
            self.num_made += event.kind == "made"
            self.num_failed += event.kind == "failed"
            self.progress.say(event)


def _as_own(job: Job, results: Results) -> Job:
    """The job, allowed to replace what it left itself."""
    request: Mapping[str, object] = {**job.request, "own": results.left(job)}
    return Job(job.line, job.output, job.key, request, job.model)
