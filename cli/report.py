"""What a run used, for the terminal and for `--report`."""

from __future__ import annotations

import argparse

from ..memory.report.report import RunReport
from ..memory.report.timeline import draw_timeline
from ..system.atomic_files import write_file


def show_report(report: RunReport, options: argparse.Namespace) -> None:
    """Print the table; with `--report` write the JSON too, and a timeline beside it."""
    print(report.table())
    if options.report is not None:
        report.save(options.report)
        write_file(options.report.with_suffix(".png"), draw_timeline(report))
