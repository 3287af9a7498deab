"""A jobs' file: one JSON object a line, each with a number for what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..system.bounded_json import is_deep

MOST_BYTES = 256 * 2**20  # of a file: a hundred thousand jobs have some fifty million
MOST_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Job:
    """One line, ready to be given to a worker: `request` is what that is told.

    `key` is equal for jobs that make the same file with the same settings; jobs of one `model` are best made by one
    worker.
    """

    line: int
    output: Path
    key: str
    request: Mapping[str, Any] = field(repr=False)
    model: str = ""


@dataclass(frozen=True)
class BadLine:
    """A line that is no job, and why."""

    line: int
    reason: str
    output: str = ""


def read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadLine]]:
    """The objects of a file by their line, from 1 on; blank lines are left out. ValueError where it cannot be read."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, and a file of jobs at most {MOST_BYTES}: split it"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}): give a file with one JSON object a line, the flags of generate"
        ) from error
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, _read(number, line)


def _read(number: int, line: bytes) -> Mapping[str, Any] | BadLine:
    if len(line) > MOST_LINE_BYTES:
        return BadLine(number, f"it has {len(line)} bytes, and a job at most {MOST_LINE_BYTES}")
    try:
        values = json.loads(
            line.decode("utf-8"), object_pairs_hook=_no_doubles, parse_constant=_no_constant, parse_float=_finite
        )
        if is_deep(values):
            raise RecursionError
    except UnicodeDecodeError:
        return BadLine(number, "it is no UTF-8 text: save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadLine(number, f"it is no JSON ({error.msg} at column {error.colno}): one object a line")
    except RecursionError:
        return BadLine(number, "it is nested too deep: one object of plain values")
    except ValueError as error:
        return BadLine(number, str(error))
    if not isinstance(values, dict):
        return BadLine(
            number, f'it is {kind_of(values)}: expected an object such as {{"prompt": "...", "output": "..."}}'
        )
    return values


def check_output(kind: str, request: Mapping[str, Any]) -> None:
    """ValueError where a job's output is there, and is not what this very job left. `kind` is "check" or "make"."""
    path = Path(request["output"])
    is_own = request.get("own") or (kind == "make" and request.get("attempt"))  # a worker that was lost left it
    if path.exists() and not (request["overwrite"] or is_own):
        raise ValueError(f"{path} exists already: choose another name, or give overwrite to replace it")


def kind_of(value: object) -> str:
    """What JSON calls a value, for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number"}
    return "null" if value is None else names.get(type(value), "a number")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)} twice: give it once")
    return values


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text[:40])


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number that JSON has: give a finite one")
