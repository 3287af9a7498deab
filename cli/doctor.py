"""`lowvram-video doctor`: what of this machine works, and the command that mends what does not."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from ..doctor.bug_report import bug_report
from ..doctor.examine import Examination
from ..system.atomic_files import write_file
from .arguments import add_device, add_models, check_models
from .output import begins_with, check_replaced
from .progress import TerminalProgress

CANNOT_GENERATE = 1
REPORT_START = b'{\n "can_generate"'


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="write it there too for a bug report, without user names, home folders and prompts",
    )  # fmt: skip
    add_models(parser)
    add_device(parser)
    parser.set_defaults(command=doctor)


def doctor(options: argparse.Namespace) -> int:
    """Try everything and print it; the exit status is 1 where nothing can be generated before something is mended."""
    report: Path | None = options.report
    if report is not None:
        check_replaced(report, "report of doctor's", partial(begins_with, REPORT_START))
    check_models(options.models)
    findings = Examination(_device(options.device), options.models).run(TerminalProgress(sys.stderr))
    if report is not None:
        write_file(report, bug_report(findings).encode() + b"\n")
    print(findings.to_json() if options.json else findings.text(sys.stdout.encoding or "ascii"))
    if report is not None:
        print(f"{report}: to attach to a bug report", file=sys.stderr)  # JSON alone may be read from stdout
    return 0 if findings.can_generate else CANNOT_GENERATE


def _device(name: str) -> torch.device:
    """The device by name, whatever is wrong with it: that is what is asked."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device; expected cuda, cuda:1 or cpu") from error
