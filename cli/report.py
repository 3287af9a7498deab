"""What a run used, for the terminal and for `--report`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..memory.report.report import RunReport
from ..system.atomic_files import write_file
from .output import begins_with, check_replaced

BEGINNING = b'{"phases"'  # of every report


def check_report(path: Path | None) -> None:
    """ValueError where `--report` cannot be written, or would replace what is no report or timeline of one."""
    if path is not None:
        check_replaced(path, "report", partial(begins_with, BEGINNING), picture="timeline")


def show_report(report: RunReport, options: argparse.Namespace) -> None:
    """Write the JSON of `--report` and a timeline beside it, and print the table: a terminal may be gone by now."""
    path: Path | None = options.report
    if path is not None:
        report.save(path)
        from ..memory.report.timeline import draw_timeline  # matplotlib: without it all commands start sooner

        write_file(path.with_suffix(".png"), draw_timeline(report))
    print(report.table())
    if path is not None:
        print(f"report: {path}, timeline: {path.with_suffix('.png')}")
