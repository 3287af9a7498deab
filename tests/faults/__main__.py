"""Every fault that a run can meet, for real: kills, disks, files that change, full cards, interrupts, two at once.

    make faults                                     all of it, an hour or more of one core
    python -m tests.faults [PART ...] [--points N] [--out FILE] [--readme]

The server's part wants a ComfyUI in COMFYUI_DIR or ~/ComfyUI. Prints the table of the README, and writes each fault to
FILE as it is found, as JSON. Parts that FILE has already, and that are not tried now, stay in it; long ones that were
cut off go on where they were. `--readme` tries nothing: it puts the table of FILE into the README. Exit code 1 where
something is not as it should be.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from ..comfyui.conftest import installations
from .at_once import interrupts, two_at_once
from .disks import broken_folders, changed_models, full_disks
from .files import Files, make_files
from .kills import cases, kill_everywhere
from .out_of_memory import out_of_memory
from .record import Known, Record
from .servers import kill_servers
from .table import Row, as_markdown, write_readme

Part = Callable[[Files, Path, int, Known], Iterator[Row]]


def kills(files: Files, place: Path, points: int, known: Known) -> Iterator[Row]:
    for case in cases(files):
        yield from kill_everywhere(case, place, points, known)


def disks(files: Files, place: Path, points: int, _: Known) -> Iterator[Row]:
    yield from full_disks(files, place, max(2, points // 6))
    yield from broken_folders(files, place)


def servers(files: Files, place: Path, points: int, known: Known) -> Iterator[Row]:
    found = installations()
    if found:
        yield from kill_servers(found[0], place, points, known)
    else:
        print("no ComfyUI in COMFYUI_DIR or ~/ComfyUI: its server was not killed", file=sys.stderr)


PARTS: Mapping[str, Part] = {
    "kills": kills,
    "disks": disks,
    "models": lambda files, place, points, _: changed_models(files, place),
    "interrupts": lambda files, place, points, _: interrupts(files, place, max(2, points // 3)),
    "two": lambda files, place, points, _: two_at_once(files, place, max(1, points // 25)),
    "memory": lambda files, place, points, known: out_of_memory(files, 2 * points, known=known),
    "servers": servers,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--points", type=int, default=51, help="kills of each command, and in proportion of the rest")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--readme", action="store_true", help="put the table of --out into the README")
    options = parser.parse_args()
    if options.readme:
        write_readme(options.out)
        return 0
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    record, rows = Record(options.out, list(PARTS)), list[Row]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = make_files(Path(folder) / "files")
        for name in options.parts or PARTS:
            for row in record.fill(name, partial(PARTS[name], files, Path(folder) / name, options.points)):
                rows.append(row)
                if not row.right:
                    print(row, file=sys.stderr, flush=True)
            print(f"{name}: {record.parts[name].seconds} s, {len(rows)} faults so far", file=sys.stderr, flush=True)
    print(as_markdown(rows))
    return int(not all(row.right for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
