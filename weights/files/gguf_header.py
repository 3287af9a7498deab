"""The header of a GGUF file: metadata fields and where each tensor lies.

Source of the format: ggml-org/ggml `docs/gguf.md`. The `gguf` package's GGUFReader does the same, but takes 8 s for a
UMT5 file, whose metadata lists 256,384 tokens; this walks over such lists in a fraction of a second. Counts and lengths
are held against the file's size and against bounds that no model comes near, before anything is read by them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...system.plain_text import short, shown
from ...system.regular_files import open_regular
from .checkpoint import IMPOSTORS, CheckpointError, unreadable

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
SHORT_LIST = 16  # elements; longer lists are kept only where asked for by name
MAX_DIMS = 8

MOST_HEADER_BYTES = 100_000_000
MOST_ENTRIES = 1 << 16  # of fields, and of tensors
MOST_NAME_BYTES = 1 << 16
MOST_TEXT_BYTES = 1 << 24
MOST_TEXTS = 1 << 20  # in all lists together: vocabularies and merges are half a million at most
MOST_KEPT = 1 << 19  # elements of a list that is wanted
FIELD_BYTES, TENSOR_BYTES, TEXT_BYTES = 13, 13, 8  # the least that each takes

# Value types of metadata by number; 8 is a string and 9 a list.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, LIST = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header tells of it: `shape` in torch's order, `type_number` as in ggml, `offset` absolute."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    fields: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_gguf_header(path: Path, long_lists: Collection[str] = ()) -> GgufHeader:
    """Read a header. `long_lists` names the fields whose long lists are wanted too. Raises CheckpointError."""
    try:
        with open_regular(path) as file:
            return _read(_Cursor(path, file), long_lists)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error


def _read(cursor: _Cursor, long_lists: Collection[str]) -> GgufHeader:
    _check_start(cursor)
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    cursor.check_count(num_tensors, TENSOR_BYTES, MOST_ENTRIES, "tensors")
    cursor.check_count(num_fields, FIELD_BYTES, MOST_ENTRIES, "metadata fields")
    fields = _fields(cursor, num_fields, long_lists)
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = fields.get(ALIGNMENT_KEY, 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"its alignment is {shown(alignment)}, which is no power of 2")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(GgufTensor(name, shape, number, data_start + at) for name, shape, number, at in entries)
    return GgufHeader(fields, tensors)


def _fields(cursor: _Cursor, count: int, long_lists: Collection[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.string(MOST_NAME_BYTES)
        if key in seen:
            raise cursor.damaged(f"its metadata has {short(key)} twice")
        seen.add(key)
        value = cursor.value(cursor.number("I"), key in long_lists)
        if value is not None:
            fields[key] = value
    return fields


def _check_start(cursor: _Cursor) -> None:
    start = cursor.file.read(32)
    for magic, what, fix in IMPOSTORS:
        if magic != MAGIC and start.lstrip().startswith(magic):
            raise CheckpointError(f"{cursor.path}: this is {what}; expected a GGUF model; {fix}")
    if start[:4] != MAGIC:
        raise CheckpointError(
            f"{cursor.path}: not a GGUF file ({cursor.size:,} bytes, starts with {start[:8]!r}); expected a GGUF "
            "model; download it again, or rename it if it is a .safetensors file"
        )
    cursor.file.seek(4)
    cursor.position = 4
    version = cursor.number("I")
    if version not in (2, 3):
        what = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{cursor.path}: a GGUF file of {what}; expected version 2 or 3, little-endian; "
            "download another release of the model"
        )


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(MOST_NAME_BYTES)
    num_dims = cursor.number("I")
    if num_dims > MAX_DIMS:
        raise cursor.damaged(f"{short(name)} has {num_dims} dimensions")
    dims = [cursor.number("Q") for _ in range(num_dims)]
    return name, tuple(reversed(dims)), cursor.number("I"), cursor.number("Q")


class _Cursor:
    """Goes through a file from front to back."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.position = path, file, 0
        self.size = os.fstat(file.fileno()).st_size
        self._num_texts = 0  # in lists

    def read(self, num: int) -> bytes:
        self._check(num)
        self.position += num
        return self.file.read(num)

    def skip(self, num: int) -> None:
        self._check(num)
        self.position += num
        self.file.seek(num, 1)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.read(struct.calcsize("<" + code)))[0]

    def string(self, most_bytes: int = MOST_TEXT_BYTES) -> str:
        num = self.number("Q")
        self._check(num)
        if num > most_bytes:
            raise self.damaged(f"a text of {num:,} bytes in its header, the most is {most_bytes:,}")
        return self.read(num).decode("utf-8", errors="replace")

    def value(self, kind: int, whole: bool) -> Any:
        """A metadata value; None for a long list that is not wanted."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != LIST:
            raise self.damaged(f"a metadata value is of the unknown type {kind}")
        element, count = self.number("I"), self.number("Q")
        keep = whole or count <= SHORT_LIST
        most = MOST_KEPT if keep else MOST_HEADER_BYTES
        if element in SCALARS:
            code = SCALARS[element]
            self.check_count(count, struct.calcsize("<" + code), most, "elements of a list")
            num_bytes = count * struct.calcsize("<" + code)
            return list(struct.unpack(f"<{count}{code}", self.read(num_bytes))) if keep else self.skip(num_bytes)
        if element != STRING:
            raise self.damaged(f"a metadata list is of the unknown type {element}")
        self.check_count(count, TEXT_BYTES, min(most, MOST_TEXTS - self._num_texts), "texts of a list")
        self._num_texts += count
        if keep:
            return [self.string() for _ in range(count)]
        for _ in range(count):
            self.skip(self.number("Q"))
        return None

    def check_count(self, count: int, least_bytes: int, most: int, what: str) -> None:
        """CheckpointError where so many cannot be in the rest of the file, or are more than any model has."""
        self._check(count * least_bytes)
        if count > most:
            raise self.damaged(f"it states {count:,} {what}, the most is {most:,}")

    def damaged(self, detail: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: a damaged file: {detail}; expected a GGUF model; download it again")

    def _check(self, num: int) -> None:
        if self.position + num > self.size:
            raise CheckpointError(
                f"{self.path}: a truncated GGUF file, {self.size:,} bytes, ends within its header; expected more than "
                f"{self.position + num:,}; the download or copy was cut short: download it again"
            )
        if self.position + num > MOST_HEADER_BYTES:
            raise self.damaged(f"its header has more than {MOST_HEADER_BYTES:,} bytes")
