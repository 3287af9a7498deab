"""JSON of others: read within bounds, so that no file takes the memory, the time or the arithmetic of who reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .regular_files import read_regular

MOST_BYTES = 64 << 20  # of a file; the largest that are read are tokenizers, of 10 to 20 MB
MOST_DEPTH = 64
MOST_DIGITS = 20  # of a whole number: 2**63 has 19, and a sign; 2**64 has 20
LARGEST = 3.5e38  # of a number with a fraction: what fp32 holds


class JsonError(ValueError):
    """Why a text is not read: "no valid JSON (...)", in one line."""


def read_json(path: Path, most_bytes: int = MOST_BYTES, finite: bool = True) -> Any:
    """The JSON of a regular file of at most so many bytes. JsonError, and OSError as the system's."""
    return parse_json(read_regular(path, most_bytes), most_bytes, finite=finite)


def read_json_object(path: Path, most_bytes: int = MOST_BYTES, finite: bool = True) -> dict[str, Any]:
    """The same; JsonError for what is no object."""
    content = read_json(path, most_bytes, finite)
    if not isinstance(content, dict):
        raise JsonError(f"a JSON {_kind(content)}, expected an object")
    return content


def parse_json(
    text: bytes | str,
    most_bytes: int = MOST_BYTES,
    once: Collection[str] = (),
    finite: bool = True,
    most_integer: int = 2**63 - 1,
) -> Any:
    """The value of a JSON text: UTF-8, whole numbers within 2^63, others finite and within fp32, no halves of
    characters, nested 64 deep at most. Of a key that comes twice the last counts, unless `once` has it. Python's NaN
    and Infinity are JSON only where not `finite`: whoever reads them then says where they stand. `most_integer` is
    2^64 - 1 where seeds are among them. JsonError.
    """
    if len(text) > most_bytes:
        raise JsonError(f"too large: {len(text):,} bytes of JSON, expected at most {most_bytes:,}")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        numbers: dict[str, Any] = {
            "parse_int": partial(_integer, most=most_integer),
            "parse_float": _number,
            "parse_constant": _refused if finite else float,
        }
        value = json.loads(text, object_pairs_hook=_Objects(once) if once else None, **numbers)
        if "\\u" in text:  # only an escape can make half a character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"nested deeper than {MOST_DEPTH}") from None
    except UnicodeError as error:
        raise JsonError(f"no valid JSON (no whole characters: {getattr(error, 'reason', error)})") from error
    except ValueError as error:
        raise JsonError(f"no valid JSON ({error})") from error
    if is_deep(value):
        raise JsonError(f"nested deeper than {MOST_DEPTH}")
    return value


class _Objects:
    """Makes objects; keys of `once` come once in each."""

    def __init__(self, once: Collection[str]) -> None:
        self._once = once

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = [key for key in self._once if keys.count(key) > 1]
            if twice:
                raise JsonError(f"no valid JSON ({twice[0]} comes twice in one object)")
        return made


def _integer(text: str, most: int) -> int | float:
    if len(text) > MOST_DIGITS:
        raise JsonError(f"no valid JSON (a whole number of {len(text):,} digits)")
    if text == "-0":
        return -0.0  # which counts nothing
    value = int(text)
    if not -(2**63) <= value <= most:
        raise JsonError(f"no valid JSON (the whole number {text} is beyond 2^{most.bit_length()})")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise JsonError(f"no valid JSON (the number {text[:40]} is beyond {LARGEST:g})")
    return value


def _refused(name: str) -> Any:
    raise JsonError(f"no valid JSON ({name} is no number of it)")


def is_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than anything that is read here."""
    layer = _inside([value])
    for _ in range(MOST_DEPTH):
        if not layer:
            return False
        layer = _inside(item for holder in layer for item in (holder.values() if isinstance(holder, dict) else holder))
    return bool(layer)


def _inside(items: Iterable[Any]) -> list[Any]:
    return [item for item in items if isinstance(item, dict | list)]


def _kind(value: object) -> str:
    names = {list: "list", str: "text", bool: "true or false", int: "number", float: "number"}
    return names.get(type(value), "null")
