"""A benchmark whose rows outlast each other: a child makes them, and another goes on where one of them failed or hung.

Rows are in one JSON file, which is written after each of them, so that nothing is lost with whatever follows.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowvram_video.system.atomic_files import write_file
from measure import machine

CHILD = "--child"
SEPARATOR = ";"  # of the names that a child is given
FAILED = 3  # what a child ends with after it has noted a row that failed
TRACE_LINES = 40

Row = dict[str, Any]  # of "name", and "failed" where it has no figures


class Rows:
    """Those of one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def drop_failed(self) -> None:
        if self.rows:
            self.rows = [row for row in self.rows if "failed" not in row]
            self._write()

    def _write(self) -> None:
        write_file(self.path, json.dumps({"machine": machine(), "rows": self.rows}, indent=1).encode())

    def missing(self, names: Sequence[str]) -> list[str]:
        done = {row["name"] for row in self.rows}
        return [name for name in names if name not in done]

    @property
    def _trace(self) -> Path:
        return self.path.with_suffix(".trace.txt")

    @contextmanager
    def watched(self, name: str, limit_seconds: float) -> Iterator[None]:
        """Of a child: a row that takes so long, or fails, ends the process and leaves what its threads were at.

        What is wrong with the request (ValueError) is noted, and the process goes on.
        """
        with self._trace.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback_later(limit_seconds, exit=True, file=file)
            try:
                yield
            except ValueError as error:
                self.add({"name": name, "failed": str(error)})
            except Exception:  # noqa: BLE001 - whatever it is, the next child goes on
                file.write(traceback.format_exc())
                file.flush()
                os._exit(FAILED)  # threads and a device that hang would keep it here
            finally:
                faulthandler.cancel_dump_traceback_later()

    def why(self) -> str:
        """What the last child left of the row that ended it."""
        text = self._trace.read_text(encoding="utf-8", errors="replace") if self._trace.exists() else ""
        self._trace.unlink(missing_ok=True)
        return "\n".join(text.strip().splitlines()[-TRACE_LINES:])


def is_child() -> bool:
    return CHILD in sys.argv


def make_all(
    names: Sequence[str], out: Path | None, table: Callable[[Sequence[Row]], str], go_on: bool = False
) -> None:
    """Have children of this script make these rows, each the ones that are left; print a table last.

    `go_on` keeps what `out` has already of an earlier call; rows that failed there are made once more.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = out or Path(folder) / "rows.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if go_on:
            Rows(path).drop_failed()
        else:
            path.unlink(missing_ok=True)
        while left := Rows(path).missing(names):
            command = [sys.executable, *sys.argv, CHILD, "--rows", SEPARATOR.join(left), "--out", str(path)]
            ended = subprocess.run(command, check=False).returncode
            rows, still = Rows(path), Rows(path).missing(left)
            if not still:
                break
            if ended == 0:
                raise RuntimeError(f"a child that made {left} ended without {still}")
            rows.add({"name": still[0], "failed": rows.why() or f"the process ended with {ended}"})
            print(f"{still[0]}: {rows.rows[-1]['failed']}", flush=True)
        rows = Rows(path)
        rows.why()
        print(table([row for row in rows.rows if "failed" not in row]))
        for row in rows.rows:
            if "failed" in row:
                print(f"{row['name']:<20} failed: {_in_a_line(row['failed'])}")


def _in_a_line(failed: str) -> str:
    """The error's, or that it took too long."""
    lines = failed.strip().splitlines()
    return lines[0] if lines[0].startswith("Timeout") else lines[-1]
