"""What a run used, for the terminal and for `--report`."""

from __future__ import annotations

import argparse

from .cli_arguments import Say
from .memory.report import RunReport
from .memory.timeline import draw_timeline
from .whole_files import write_file


def say_report(report: RunReport, options: argparse.Namespace, say: Say) -> None:
    """Say the table; with `--report` write the JSON too, and a timeline beside it."""
    say(report.table())
    if options.report is not None:
        report.save(options.report)
        write_file(options.report.with_suffix(".png"), draw_timeline(report))
