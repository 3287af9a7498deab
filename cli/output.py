"""Where a command writes: never over what is there, unless that is asked for or the run's own."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..system.content_key import run_key
from ..system.output_lock import OutputLock
from ..video.writer import check_writable
from .flags import flag

ABOUT_NO_RUN = ("command", "metadata", "overwrite", "report", "verbose")  # options that may differ when a run goes on


@dataclass
class OutputFile:
    """The file of -o, or a default name that is numbered where files of that name are there.

    A context manager: what `pick` chose is this process's until it ends. A file of the same name that ends in `beside`
    is written with it, and replaced as little.
    """

    given: Path | None
    default: Path
    overwrite: bool = False
    beside: str = ""
    _lock: OutputLock | None = field(default=None, repr=False)

    @property
    def path(self) -> Path:
        """What was picked, or what is wanted."""
        return self._lock.path if self._lock is not None else self.given or self.default

    def pick(self, is_own: Callable[[Path], bool] = lambda path: False) -> Path:
        """The file to write, from now on this process's. `is_own`: this run wrote what is there, and goes on with it.

        ValueError for a file that is there, or that another run is writing.
        """
        if self._lock is not None:
            return self._lock.path
        if self.given is not None:
            self.check(is_own)
            self._lock = OutputLock(self.given)
            return self.given
        if self.overwrite:
            self._lock = OutputLock(self.default)
            return self.default
        for path in filter(is_own, itertools.takewhile(Path.exists, numbered(self.default))):
            self._lock = OutputLock(path)
            return path
        for path in numbered(self.default):
            if not any(map(Path.exists, self._files(path))) and self._take(path):
                break
        return self.path

    def check(self, is_own: Callable[[Path], bool] = lambda path: False) -> None:
        """ValueError where the given file is there and may not be replaced."""
        path = self.given
        if path is None or self.overwrite:
            return
        for there in filter(Path.is_file, self._files(path)):
            if not is_own(there):
                raise ValueError(f"{there} exists already: choose another name, or give --overwrite to replace it")

    def check_sources(self, options: argparse.Namespace) -> None:
        """ValueError where a file that these options have read would be replaced: it is needed until the end."""
        path = self.path
        if (self.given is None and not self.overwrite) or not path.is_file():
            return
        for option, source in vars(options).items():
            if isinstance(source, Path) and option != "output" and source.is_file() and path.samefile(source):
                raise ValueError(
                    f"{path} is the file of {flag(option)} too, which is needed until the end: name another"
                )

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def _files(self, path: Path) -> list[Path]:
        """All that are written."""
        return [path, path.with_suffix(self.beside)] if self.beside else [path]

    def _take(self, path: Path) -> bool:
        try:
            self._lock = OutputLock(path)
        except ValueError:  # another run has just chosen it
            return False
        return True


def numbered(path: Path) -> itertools.chain[Path]:
    """`video.mp4`, `video_2.mp4`, `video_3.mp4` ..."""
    others = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return itertools.chain([path], others)


def check_replaced(path: Path, what: str, is_one: Callable[[Path], bool], picture: str = "") -> None:
    """ValueError where `path` cannot be written, or where what is there is no `what`: such a file is not replaced.

    With `picture`, what the PNG beside it is called: also where one is there alone.
    """
    check_writable(path)
    if path.exists() and not is_one(path):
        raise ValueError(f"{path} is no {what}, and is not replaced by one: choose another name")
    beside = path.with_suffix(".png")
    if picture and path == beside:
        raise ValueError(f"{path} is the {picture}'s name: end the {what}'s in .json")
    if picture and beside.exists() and not path.exists():
        raise ValueError(f"{beside}, where the {picture} goes, is there without a {what}: choose another name")


def begins_with(beginning: bytes, path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def command_key(options: argparse.Namespace) -> str:
    """Equal for commands that make the same: the same words, but for those that only say what is told or replaced."""
    return run_key({name: str(value) for name, value in vars(options).items() if name not in ABOUT_NO_RUN})


def add_overwrite(parser: argparse._ActionsContainer) -> None:
    """The flag that `OutputFile` reads."""
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output if there is one")
