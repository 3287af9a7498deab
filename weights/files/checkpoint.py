"""Checkpoint files: what tensors they hold and where, and reads that copy each byte once."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...system.direct_reads import PAGE, RawFile
from ...system.file_stamp import Stamp, change_of
from ...system.host_memory import allocate_bytes
from ...system.plain_text import LONGEST, printable

DIRECT_BYTES = 2 << 20  # smaller tensors go through the page cache
PIECE_BYTES = 4 << 20


# What the first bytes say when a file is not safetensors at all: (start, what it is, what to do).
IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the model", "run `git lfs pull` or download the file"),
    (b"<", "a web page", "download the file again, logged in if its page asks for it"),
    (b"GGUF", "a GGUF file under another name", "rename it to end in .gguf"),
    (b"PK\x03\x04", "a PyTorch pickle under another name", "download the .safetensors version of the model"),
    (b"\x80", "a Python pickle under another name", "download the .safetensors version of the model"),
    (b"{", "a JSON text", "choose the .safetensors file itself, or the .safetensors.index.json under its own name"),
)


class CheckpointError(ValueError):
    """A file that cannot be used: names the file, what it is, what was expected and what to do."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint and the bytes it occupies.

    `dtype` and `shape` are those stored (uint8 for GGUF-packed tensors, whose `quant` is a type name such
    as "Q4_K" and whose `logical_shape` is that of the unpacked tensor); `offset` is absolute in `file`, which had this
    `stamp` when its header was read.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    quant: str | None = None
    logical_shape: tuple[int, ...] | None = None
    stamp: Stamp | None = field(default=None, compare=False)

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """That of the numbers, however they are packed."""
        return self.logical_shape or self.shape


class Source(Protocol):
    """A model's stored tensors, such as a Checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(self, name: str, out: Tensor) -> None: ...


def read_tensor(source: Source, name: str) -> Tensor:
    """One tensor in its stored dtype and shape, in memory of its own."""
    info = source.tensors[name]
    raw = allocate_bytes(info.nbytes)
    source.read_into(name, raw)
    return raw.view(info.dtype).view(info.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, in one file or several shards; nothing is read until asked for.

    Reading is thread-safe: every call opens its own file handle.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors by name, unpacked."""
        return {name: info.unpacked_shape for name, info in self.tensors.items()}

    def file_of(self, name: str) -> Path:
        """The file that has a tensor, or has all that are named like one that is missing; `path` where several do."""
        info = self.tensors.get(name)
        root = name.partition(".")[0]
        near = {each.file for other, each in self.tensors.items() if other.partition(".")[0] == root}
        return info.file if info is not None else near.pop() if len(near) == 1 else self.path

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype and shape: one allocation, no second copy.

        Raises KeyError for an unknown name and CheckpointError when the file cannot be read.
        """
        return read_tensor(self, name)

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor's stored bytes into `out`, a contiguous 1-D uint8 CPU tensor of just that many.

        `out` may be pinned or a view of a larger buffer. Raises KeyError, ValueError (an unsuitable `out`)
        and CheckpointError (the file was changed, replaced or deleted since it was opened).
        """
        info = self.tensors[name]
        if out.dtype != torch.uint8 or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(f"read_into needs a contiguous uint8 CPU tensor, not {out.dtype} on {out.device}")
        if tuple(out.shape) != (info.nbytes,):
            raise ValueError(f"{name} is {info.nbytes} bytes; read_into was given shape {tuple(out.shape)}")
        try:
            if not _read_directly(info, out.numpy()):
                # Unbuffered, so that the bytes go from the page cache straight into the tensor.
                with open(info.file, "rb", buffering=0) as file:
                    file.seek(info.offset)
                    _fill(file, out.numpy().data, info)
        except OSError as error:
            raise CheckpointError(unreadable(info.file, error)) from error
        _check_unchanged(info)

    def renamed(self, names: Mapping[str, str | None]) -> Checkpoint:
        """The same file under other tensor names, `{old: new}`.

        A tensor mapped to None is dropped; one that the mapping does not mention keeps its name.
        Raises CheckpointError when two tensors would get the same name.
        """
        tensors: dict[str, TensorInfo] = {}
        origins: dict[str, str] = {}
        for old, info in self.tensors.items():
            new = names.get(old, old)
            if new is None:
                continue
            if new in tensors:
                raise CheckpointError(
                    f"{self.path}: holds both {origins[new]} and {old}, two layouts' names for {new}; "
                    "expected one layout; download the model again as a single release"
                )
            tensors[new] = info if info.name == new else replace(info, name=new)
            origins[new] = old
        return Checkpoint(self.path, tensors, self.metadata)


def read_bytes(file: Path, offset: int, out: Tensor, stamp: Stamp | None) -> None:
    """Read a part of a tensor, the bytes of its file from `offset` on into all of `out`: as `Checkpoint.read_into`.

    `stamp` is the file's when its header was read.
    """
    part = TensorInfo("", torch.uint8, (out.numel(),), file, offset, out.numel(), stamp=stamp)
    Checkpoint(file, {"": part}, {}).read_into("", out)


def _check_unchanged(info: TensorInfo) -> None:
    """CheckpointError where what was read is not of the file whose header says where its tensors are."""
    what = None if info.stamp is None else change_of(info.file, info.stamp)
    if what is not None:
        raise CheckpointError(
            f"{info.file} was {what} since it was opened, and its tensors may be others, or elsewhere in it: start "
            "again, and leave the file alone meanwhile"
        )


def _read_directly(info: TensorInfo, out: np.ndarray) -> bool:
    """Read a large tensor past the page cache, in page-aligned pieces; False where that cannot or need not be done.

    Filling the cache costs about as much as reading a fast disk; but what the cache holds already is faster still.
    """
    if info.nbytes < DIRECT_BYTES:
        return False
    raw = RawFile(info.file)
    try:
        if not raw.direct or raw.is_cached(info.offset + info.nbytes // 2):
            return False
        piece = mmap.mmap(-1, PIECE_BYTES)  # page-aligned, as direct reads want it
        values = np.frombuffer(piece, dtype=np.uint8)
        end = info.offset + info.nbytes
        for start in range(info.offset // PAGE * PAGE, end, PIECE_BYTES):
            first, last = max(start, info.offset), min(start + PIECE_BYTES, end)
            pages = -(-(last - start) // PAGE) * PAGE
            raw.read(memoryview(piece)[:pages], start, last - start)
            out[first - info.offset : last - info.offset] = values[first - start : last - start]
        return True
    finally:
        raw.close()


def _fill(file: Any, target: memoryview, info: TensorInfo) -> None:
    """Fill `target` from the file; one read may return less than asked for (2 GiB at most on Linux)."""
    position = 0
    while position < info.nbytes:
        count = file.readinto(target[position:])
        if not count:
            expected = f"at least {info.offset + info.nbytes:,}"
            raise CheckpointError(truncated(info.file, "model", expected, info.file.stat().st_size))
        position += count


def truncated(path: Path, kind: str, expected: str, actual: int) -> str:
    return (
        f"{path}: a truncated {kind} file, {actual:,} bytes; expected {expected} by its header; "
        "the download or copy was cut short: download it again"
    )


def damaged(path: Path, detail: str) -> str:
    return f"{path}: a damaged file: {detail}; expected it to agree with itself; download it again"


def unreadable(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{path}: cannot be read ({reason}); expected a readable model file; check that it exists and its rights"


def some_names(names: Sequence[str], noun: str) -> str:
    """Count and first few: "12 tensors (a, b, c, …)"."""
    first = ", ".join(printable(name)[:LONGEST] for name in names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({first})"
