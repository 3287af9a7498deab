"""Processes of a benchmark that make ready beside each other, and then measure one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def wait_for_turn() -> None:
    """Of such a process: it is ready, and measures when it is its turn."""
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()


class Worker:
    """A Python process that writes a line of JSON for each of its results.

    What it says to stderr is in the file `log`. `failed` tells why there are not all of its results.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.failed = name, ""
        self._said: list[dict[str, Any]] = []
        self._log, self._began = log, time.monotonic()
        with open(log, "w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._said.append(json.loads(line))

    def wait_until_ready(self, seconds: float) -> None:
        """So long after its start; a process that is not ready then is ended."""
        while self._process.poll() is None and not self._said:
            if time.monotonic() > self._began + seconds:
                self._end(f"not ready within {seconds:g} s")
            time.sleep(0.05)

    def results(self, seconds: float) -> list[dict[str, Any]]:
        """Let it measure; what it found, which may be less than all. A process that takes longer is ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed before
            self._process.stdin.write("go\n")
            self._process.stdin.close()
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._end(f"not measured within {seconds:g} s")
        self._reader.join()
        if self._process.returncode and not self.failed:
            self.failed = self._reason()
        return [line for line in self._said if "ready" not in line]

    def _end(self, why: str) -> None:
        self.failed = why
        self._process.kill()
        self._process.wait()

    def _reason(self) -> str:
        """The last error that it told of."""
        log = self._log.read_text(encoding="utf-8", errors="replace")
        print(f"--- {self.name} failed:\n{log[-3000:]}", file=sys.stderr)
        errors = [line.strip() for line in log.splitlines() if "Error" in line]
        return errors[-1][:200] if errors else f"exit code {self._process.returncode}"
