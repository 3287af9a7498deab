"""One command of the command line in a process of its own, with a fault at an exact point of it."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lowvram_video.cli.main import main
from lowvram_video.framepack.network.model import FramePackModel
from lowvram_video.wanvideo.network.model import WanModel

PACK = str(Path(sys.modules[main.__module__].__file__ or "").absolute().parents[1])  # as code objects name it
OUR_OWN = ("/tests/", "/benchmarks/", "/.venv/")
KINDS = ("files", "calls", "passes")
SECONDS = 120
WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.truncate")
# a fork has torch imported already; elsewhere each command takes seconds
METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"

Action = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """`action` once, at the n-th of a kind: changes of files in `folder`, calls of our functions, or model passes.

    With `refuse`, an error number, every change of a file from there on fails with it too. `at` 0 only counts.
    """

    folder: Path
    count: str = "files"
    at: int = 0
    action: Action | None = None
    refuse: int = 0


@dataclass
class Ended:
    """How a command ended; `counts` are how many there were of each kind, unless it was killed."""

    status: int | None  # None: it hung, and was killed for it
    seconds: float
    out: str
    err: str
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.err.splitlines()) if line.strip()), "")

    @property
    def one_line(self) -> bool:
        """Whether what is said of the failure is one line of ours, not Python's way of telling the system's errors."""
        return not self.traceback and self.last_line.startswith("lowvram-video: ") and "[Errno" not in self.last_line


def run(words: Sequence[Any], fault: Fault | None = None, cwd: Path | None = None, seconds: float = SECONDS) -> Ended:
    """One command, to its end."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place)
        process = start(words, report, fault, cwd)
        return wait(process, report, seconds)


def start(
    words: Sequence[Any], report: Path, fault: Fault | None = None, cwd: Path | None = None
) -> multiprocessing.process.BaseProcess:
    """Begin one command; what it says goes to `report`."""
    context = multiprocessing.get_context(METHOD)
    process = context.Process(target=_child, args=([str(word) for word in words], report, fault, cwd))
    (report / "began").write_text(repr(time.monotonic()))
    process.start()
    return process


def wait(process: multiprocessing.process.BaseProcess, report: Path, seconds: float = SECONDS) -> Ended:
    """What became of a command that was begun."""
    process.join(seconds)
    took = time.monotonic() - float((report / "began").read_text())
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    said = [(report / name).read_text(errors="replace") if (report / name).exists() else "" for name in ("out", "err")]
    counts = json.loads((report / "counts").read_text()) if (report / "counts").exists() else {}
    process.close()
    return Ended(status, took, said[0], said[1], counts)


# --- actions ---------------------------------------------------------------------------------------------


def kill(folder: Path) -> None:
    """As `kill -9`, or TerminateProcess."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def interrupt(folder: Path) -> None:
    signal.raise_signal(signal.SIGINT)


def terminate(folder: Path) -> None:
    signal.raise_signal(signal.SIGTERM)


def delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def fill(folder: Path) -> None:
    """Leave no byte free of a small disk."""
    with (folder / "filler").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def truncate(folder: Path, path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unlink(folder: Path, path: Path) -> None:
    path.unlink()


def overwrite(folder: Path, path: Path, other: Path) -> None:
    """In place: the file stays the same one."""
    with other.open("rb") as source, path.open("r+b") as target:
        shutil.copyfileobj(source, target)


def exchange(folder: Path, path: Path, other: Path) -> None:
    """Another file of that name."""
    shutil.copy(other, path.with_name("incoming"))
    os.replace(path.with_name("incoming"), path)


def on(path: Path, action: Callable[..., None], *more: Path) -> Action:
    """An action on a file that is not in the folder that is watched."""
    names = ("path", "other")
    return functools.partial(action, **dict(zip(names, (path, *more), strict=False)))


# --- in the process --------------------------------------------------------------------------------------


class Counter:
    """Counts what happens in this process, and has the fault strike."""

    def __init__(self, fault: Fault) -> None:
        self._fault = replace(fault, folder=fault.folder.absolute())
        self._prefix = str(self._fault.folder) + os.sep
        self._process, self._struck = os.getpid(), False
        self.counts = dict.fromkeys(KINDS, 0)

    def install(self) -> None:
        sys.addaudithook(self._audit)
        if self._fault.count == "calls":
            sys.setprofile(self._profile)
        for model in (WanModel, FramePackModel):
            model.forward = self._counted(model.forward)  # type: ignore[method-assign]

    def note(self, kind: str) -> None:
        """Another of a kind."""
        fault = self._fault
        self.counts[kind] += 1
        if kind != fault.count or not fault.at:
            return
        if self.counts[kind] == fault.at:
            self._struck = True
            if fault.action is not None:
                fault.action(fault.folder)

    def _audit(self, event: str, given: tuple[Any, ...]) -> None:
        if os.getpid() != self._process or not self._is_change(event, given):
            return
        self.note("files")
        if self._struck and self._fault.refuse and event != "os.remove":
            raise OSError(self._fault.refuse, os.strerror(self._fault.refuse), str(given[0]))

    def _is_change(self, event: str, given: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = given
            writes = isinstance(flags, int) and bool(flags & WRITES)
        else:
            path, writes = (given or ("",))[0], event in CHANGES
        if not writes or not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self._prefix)

    def _profile(self, frame: FrameType, event: str, given: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACK) and not any(part in name for part in OUR_OWN):
            self.note("calls")

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*given: Any, **named: Any) -> Any:
            self.note("passes")
            return forward(*given, **named)

        return counted


def _child(words: list[str], report: Path, fault: Fault | None, cwd: Path | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(report / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if cwd is not None:
        os.chdir(cwd)
    counter = Counter(fault or Fault(report / "nothing"))
    counter.install()
    sys.exit(_command(words, counter, report))


def _command(words: list[str], counter: Counter, report: Path) -> int:
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - what a user would see as a traceback
        traceback.print_exc()
        status = 70
    sys.setprofile(None)
    (report / "counts").write_text(json.dumps(counter.counts))
    sys.stdout.flush()
    sys.stderr.flush()
    return status
