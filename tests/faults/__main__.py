"""Every fault that a run can meet, for real: kills, disks, files that change, full cards, interrupts, two at once.

    make faults                                     all of it, 20 minutes of one core
    python -m tests.faults [PART ...] [--points N] [--out FILE] [--readme]

The server's part wants a ComfyUI in COMFYUI_DIR or ~/ComfyUI. Prints the table of the README, and writes JSON with each
fault; parts that a FILE has already, and that are not tried now, stay in it. `--readme` tries nothing: it puts the
table of FILE into the README. Exit code 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from lowvram_video.system.atomic_files import write_file

from ..comfyui.conftest import installations
from .at_once import interrupts, two_at_once
from .disks import broken_folders, changed_models, full_disks
from .files import Files, make_files
from .kills import cases, kill_everywhere
from .out_of_memory import out_of_memory
from .servers import kill_servers
from .table import Row, Tried, as_json, as_markdown, from_json, write_readme

Part = Callable[[Files, Path, int], Iterator[Row]]


def kills(files: Files, place: Path, points: int) -> Iterator[Row]:
    for case in cases(files):
        yield from kill_everywhere(case, place, points)


def disks(files: Files, place: Path, points: int) -> Iterator[Row]:
    yield from full_disks(files, place, max(2, points // 6))
    yield from broken_folders(files, place)


def servers(files: Files, place: Path, points: int) -> Iterator[Row]:
    found = installations()
    if found:
        yield from kill_servers(found[0], place, points)
    else:
        print("no ComfyUI in COMFYUI_DIR or ~/ComfyUI: its server was not killed", file=sys.stderr)


PARTS: Mapping[str, Part] = {
    "kills": kills,
    "disks": disks,
    "models": lambda files, place, points: changed_models(files, place),
    "interrupts": lambda files, place, points: interrupts(files, place, max(2, points // 3)),
    "two": lambda files, place, points: two_at_once(files, place, max(1, points // 25)),
    "memory": lambda files, place, points: out_of_memory(files, 2 * points),
    "servers": servers,
}


def keep(out: Path, parts: Mapping[str, Tried]) -> None:
    """What was found so far: all of it takes long, and may be cut off."""
    machine = {"system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}
    write_file(out, json.dumps({"machine": machine, **as_json(parts)}, indent=1).encode())


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
    parts = {} if options.out is None or not options.out.exists() else from_json(options.out)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = make_files(Path(folder) / "files")
        for name in options.parts or PARTS:
            began, tried = time.monotonic(), []
            for row in PARTS[name](files, Path(folder) / name, options.points):
                tried.append(row)
                if not row.right:
                    print(row, file=sys.stderr, flush=True)
            rows += tried
            parts[name] = Tried(round(time.monotonic() - began), tried)
            print(f"{name}: {parts[name].seconds} s, {len(rows)} faults so far", file=sys.stderr, flush=True)
            if options.out is not None:
                keep(options.out, {each: parts[each] for each in PARTS if each in parts})
    print(as_markdown(rows))
    return int(not all(row.right for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
