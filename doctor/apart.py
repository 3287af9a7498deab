"""Trials in a process of their own: a package that crashes, or hangs, takes only that one with it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from ..system.bounded_json import JsonError, parse_json
from ..system.plain_text import short
from .trials import Outcome, Result

STUCK_SECONDS = 180.0  # kernels are compiled, and tried in several sizes
FIRST_SECONDS = 120.0  # more for the first, before which PyTorch is loaded
# The package under its own name, wherever it lies: ComfyUI calls it by its folder.
BOOT = """
import importlib.util as util, sys
spec = util.spec_from_file_location("lowvram_video", sys.argv[1] + "/__init__.py",
                                    submodule_search_locations=[sys.argv[1]])
sys.modules["lowvram_video"] = package = util.module_from_spec(spec)
spec.loader.exec_module(package)
from lowvram_video.doctor.trials import answer
answer(sys.argv[2:])
"""


def tried_apart(names: Sequence[str], device: str, stuck_seconds: float = STUCK_SECONDS) -> dict[str, Outcome]:
    """Each trial's outcome by name; after one that takes the process with it the next ones get another process."""
    found: dict[str, Outcome] = {}
    left = list(names)
    while left:
        answers, ended = _answers(left, device, stuck_seconds)
        found |= answers
        left = [name for name in left if name not in answers]
        if left:
            found[left[0]] = Outcome("broken", ended)
            left = left[1:]
    return found


def _answers(names: Sequence[str], device: str, stuck_seconds: float) -> tuple[dict[str, Outcome], str]:
    """What one process answers, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="lowvram-doctor-", ignore_cleanup_errors=True) as folder:
        lines, said = Path(folder) / "answers", Path(folder) / "said"
        package = str(Path(__file__).parents[1])
        with said.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", BOOT, package, str(lines), device, *names],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
            try:
                ended = _ended(process, lines, stuck_seconds)
            finally:
                process.kill()
                process.wait()
        last = next((line for line in reversed(_text(said).splitlines()) if line.strip()), "")
        return _parsed(_text(lines)), f"{ended}{f': {short(last, 160)}' if last else ''}"


def _ended(process: subprocess.Popen[bytes], lines: Path, stuck_seconds: float) -> str:
    """How it ended; it is not waited for any longer than for its next answer."""
    size, deadline = 0, time.monotonic() + FIRST_SECONDS + stuck_seconds
    while True:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=0.1)
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            return f"takes the process with it, which ended {how}"
        now = lines.stat().st_size if lines.exists() else 0
        if now > size:
            size, deadline = now, time.monotonic() + stuck_seconds
        if time.monotonic() > deadline:
            return f"did not end within {stuck_seconds:g} s"


def _parsed(text: str) -> dict[str, Outcome]:
    found = {}
    for line in text.splitlines():
        with suppress(JsonError, ValueError):
            parts: Any = parse_json(line)
            name, result, said, misses = parts
            if result in get_args(Result):
                found[name] = Outcome(result, said, misses)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_bytes()[-(1 << 20) :].decode("utf-8", "replace")
    except OSError:
        return ""
