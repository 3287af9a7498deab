"""The flags of `generate` as JSON values: read by its own parser, refused in one line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..batch.job import kind_of
from ..weights.lora.file import LoraChoice
from .arguments import block_count, fraction, lora_choice, not_negative, numbers, positive
from .generate import add_generate

NOT_OF_JOBS = ("help",)
WHOLE, NUMBERS = (int, block_count), (float, positive, not_negative, fraction)


class JobParser(argparse.ArgumentParser):
    """The parser of `generate`, for jobs: it raises ValueError where the other ends the program."""

    def __init__(self) -> None:
        super().__init__(prog="generate", add_help=False, allow_abbrev=False)
        add_generate(self)
        self._known = {action.dest: action for action in self._actions if action.dest not in NOT_OF_JOBS}

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """A job's values as words of a command line, with paths from the root; null is the same as left out.

        ValueError for a flag that there is not, and for a value of another type.
        """
        words: list[str] = []
        given: dict[str, str] = {}
        for name, value in values.items():
            action = self._known.get(name.removeprefix("--").replace("-", "_"))
            if action is None:
                near = difflib.get_close_matches(name, self._known, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; see lowvram-video generate --help"
                raise ValueError(f"{name!r} is no flag of generate{hint}")
            if given.setdefault(action.dest, name) != name:
                raise ValueError(f"{name} is {given[action.dest]}: give one of them")
            if value is not None:
                words += _words(name, action, value)
        return words


def written_by(options: argparse.Namespace) -> list[Path]:
    """The files that a job writes."""
    report: Path | None = options.report
    return [options.output, *([] if report is None else [report, report.with_suffix(".png")])]


def read_by(options: argparse.Namespace) -> list[Path]:
    """The files that it reads."""
    written = ("output", "report", "runs")
    given = [value for name, value in vars(options).items() if name not in written and isinstance(value, Path)]
    return given + [lora.path for lora in [*options.lora, *options.lora_low]]


def _words(name: str, action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {kind_of(value)}: expected true or false")
        return [flag] if value else []
    if isinstance(action.default, list):
        values = value if isinstance(value, list) else [value]
        return [f"{flag}={_text(name, action.type, each)}" for each in values]
    return [f"{flag}={_text(name, action.type, value)}"]


def _text(name: str, kind: Any, value: Any) -> str:
    """A value as a word. One that has a word for itself, as -1, follows an equals sign."""
    if kind in WHOLE:
        return str(_typed(name, value, isinstance(value, int), "a whole number"))
    if kind in NUMBERS:
        return repr(_typed(name, value, isinstance(value, int | float), "a number"))
    if kind is numbers:
        if isinstance(value, list) and all(isinstance(each, int | float) for each in value):
            return ",".join(repr(float(each)) for each in value)
        return str(_typed(name, value, isinstance(value, str), "a list of numbers"))
    text = str(_typed(name, value, isinstance(value, str), "text"))
    if kind is Path:
        return str(checked_path(name, text))
    if kind is None:
        _encoded(name, text, "utf-8", "strict")
    return _lora(name, text) if kind is lora_choice else text


def _typed(name: str, value: Any, fits: bool, expected: str) -> Any:
    if isinstance(value, bool) or not fits:
        raise ValueError(f"{name} is {kind_of(value)}: expected {expected}")
    return value


def checked_path(name: str, text: str) -> Path:
    """A path from the root. ValueError for a text that is none."""
    if not text or "\0" in text:
        raise ValueError(f"{name} is {text!r}: expected a path")
    _encoded(name, text, sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
    return Path(text).absolute()


def _encoded(name: str, text: str, encoding: str, errors: str) -> None:
    try:
        text.encode(encoding, errors)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character at {error.start + 1} ({text[error.start]!r})") from None


def _lora(name: str, text: str) -> str:
    read: Callable[[str], LoraChoice] = lora_choice
    try:
        choice = read(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    return f"{checked_path(name, str(choice.path))}:{choice.strength!r}"
