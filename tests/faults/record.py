"""The results file of `make faults`: what each part found, row by row, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from filelock import FileLock
from lowvram_video.system.atomic_files import write_file

from .table import Row, Tried, as_json, from_json

Known = Mapping[tuple[str, str], Row]  # faults, by what and where, of a part that was cut off
NOTHING: Known = MappingProxyType({})


class Record:
    """Parts in a file, in `order`; processes that try different parts may share it. No file where `out` is None."""

    def __init__(self, out: Path | None, order: Sequence[str]) -> None:
        self._out, self._order = out, order
        self.parts: dict[str, Tried] = self._read()

    def fill(self, name: str, rows: Callable[[Known], Iterator[Row]]) -> Iterator[Row]:
        """The rows of a part, kept as they come. One that was cut off gets what it had found before, and goes on."""
        before = self.parts.get(name, Tried(0, []))
        known = {} if before.whole else {(row.fault, row.where): row for row in before.rows}
        spent, began, tried = 0 if before.whole else before.seconds, time.monotonic(), dict[tuple[str, str], Row]()
        for row in rows(known):
            tried[row.fault, row.where] = row
            if (row.fault, row.where) not in known:
                self._keep(
                    name, Tried(spent + round(time.monotonic() - began), [*({**known, **tried}).values()], False)
                )
            yield row
        self._keep(name, Tried(spent + round(time.monotonic() - began), [*tried.values()]))

    def _keep(self, name: str, tried: Tried) -> None:
        self.parts[name] = tried
        if self._out is None:
            return
        with FileLock(Path(tempfile.gettempdir()) / f"{self._out.name}.lock"):
            parts = {**self._read(), name: tried}
            machine = {"system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}
            found = as_json({each: parts[each] for each in self._order if each in parts})
            write_file(self._out, json.dumps({"machine": machine, **found}, indent=1).encode())

    def _read(self) -> dict[str, Tried]:
        return {} if self._out is None or not self._out.exists() else from_json(self._out)
