"""Checkpoint files: what tensors they hold and where, and reads that copy each byte once."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...system.direct_reads import PAGE, RawFile
from ...system.host_memory import allocate_bytes

DIRECT_BYTES = 2 << 20  # smaller tensors go through the page cache
PIECE_BYTES = 4 << 20


class CheckpointError(ValueError):
    """A file that cannot be used: names the file, what it is, what was expected and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint and the bytes it occupies.

    `dtype` and `shape` are those stored (uint8 for GGUF-packed tensors, whose `quant` is a type name such
    as "Q4_K" and whose `logical_shape` is that of the unpacked tensor); `offset` is absolute in `file`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    quant: str | None = None
    logical_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, in one file or several shards; nothing is read until asked for.

    Reading is thread-safe: every call opens its own file handle.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype and shape: one allocation, no second copy.

        Raises KeyError for an unknown name and CheckpointError when the file cannot be read.
        """
        info = self.tensors[name]
        raw = allocate_bytes(info.nbytes)
        self.read_into(name, raw)
        return raw.view(info.dtype).view(info.shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor's stored bytes into `out`, a contiguous 1-D uint8 CPU tensor of just that many.

        `out` may be pinned or a view of a larger buffer. Raises KeyError, ValueError (an unsuitable `out`)
        and CheckpointError (the file shrank or vanished since it was opened).
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
            raise CheckpointError(_unreadable(info.file, error)) from error

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
            tensors[new] = replace(info, name=new)
            origins[new] = old
        return Checkpoint(self.path, tensors, self.metadata)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model file by reading its header only.

    `path` is a `.safetensors` file, one of its shards (`x-00001-of-00003.safetensors`), an
    `x.safetensors.index.json`, or a folder that holds one of these. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        path = _model_in_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; expected a .safetensors model; check the name and folder")
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise CheckpointError(
            f"{path}: the file type {path.suffix or '(none)'!r} is not known; "
            f"expected {', '.join(OPENERS)}; choose a .safetensors file"
        )
    return opener(path)


# --- safetensors: one file -------------------------------------------------------------------------------

# The names of https://huggingface.co/docs/safetensors; the last is missing from older torch releases.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
}

# What the first bytes say when a file is not safetensors at all: (start, what it is, what to do).
IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the model", "run `git lfs pull` or download the file"),
    (b"<", "a web page", "download the file again, logged in if its page asks for it"),
    (b"GGUF", "a GGUF file under another name", "rename it to end in .gguf"),
    (b"PK\x03\x04", "a PyTorch pickle under another name", "download the .safetensors version of the model"),
    (b"\x80", "a Python pickle under another name", "download the .safetensors version of the model"),
    (b"{", "a JSON text", "choose the .safetensors file itself, or the .safetensors.index.json under its own name"),
)


def _open_safetensors(path: Path) -> Checkpoint:
    shards = _shards_beside(path)
    return shards if shards is not None else _open_single(path)


def _open_single(path: Path) -> Checkpoint:
    try:
        with open(path, "rb") as file:
            header, data_start = _read_header(path, file)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    _check_offsets(path, size, tensors.values())
    return Checkpoint(path, tensors, {str(key): str(value) for key, value in metadata.items()})


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header's JSON and the offset of the data that follows it."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: an empty file; expected a safetensors model; download it again")
    start = file.read(32)
    for magic, what, fix in IMPOSTORS:
        # A header length can begin with any byte, so what follows it decides first.
        if start.lstrip().startswith(magic) and start[8:9] != b"{":
            raise CheckpointError(f"{path}: this is {what}; expected a safetensors model; {fix}")
    length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
    if size < 9 or start[8:9] != b"{":
        raise CheckpointError(
            f"{path}: not a safetensors file ({size:,} bytes, no header); "
            "expected a safetensors model; download it again"
        )
    if 8 + length > size:
        raise CheckpointError(_truncated(path, f"more than {8 + length:,}", size))
    file.seek(8)
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:  # also JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(_damaged(path, f"its header is no valid JSON ({error})")) from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
        raise CheckpointError(_damaged(path, "its header is no table of tensors"))
    return header, 8 + length


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        stored, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_damaged(path, f"the header's entry for {name} is incomplete")) from error
    dtype = DTYPES.get(stored) if isinstance(stored, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has the number format {stored!r}; expected one of {', '.join(DTYPES)}; "
            "choose another release of the model (fp8, fp16 or bf16)"
        )
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            _damaged(path, f"{name} is {stored} {list(shape)} but has the byte range {begin} to {end}")
        )
    return TensorInfo(name, dtype, shape, path, data_start + begin, end - begin)


def _check_offsets(path: Path, size: int, tensors: Iterable[TensorInfo]) -> None:
    position, before = 0, ""
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset < position:
            raise CheckpointError(_damaged(path, f"the bytes of {before} and {info.name} overlap"))
        position, before = info.offset + info.nbytes, info.name
    if position > size:
        raise CheckpointError(_truncated(path, f"{position:,}", size))


# --- safetensors: shards ---------------------------------------------------------------------------------

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
INDEX_SUFFIX = ".safetensors.index.json"


def _open_index(path: Path) -> Checkpoint:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    except ValueError as error:
        raise CheckpointError(_damaged(path, f"it is no valid JSON ({error})")) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: a JSON file without a `weight_map`; expected x{INDEX_SUFFIX}; choose the .safetensors file"
        )
    if any(not isinstance(file, str) or Path(file).name != file for file in weight_map.values()):
        raise CheckpointError(_damaged(path, "its weight_map names files outside its own folder"))
    merged = _open_shards(path, sorted(set(weight_map.values())))
    for name, file in weight_map.items():
        if name not in merged.tensors or merged.tensors[name].file.name != file:
            raise CheckpointError(
                f"{path}: says that {name} is in {file}, which does not hold it; "
                "expected the index and shards of one release; download both again"
            )
    return merged


def _shards_beside(path: Path) -> Checkpoint | None:
    """The whole model when `path` is one of its shards, by its index or else by the shards' names."""
    match = SHARD_NAME.match(path.stem)
    if match is None:
        return None
    index = path.with_name(match["stem"] + INDEX_SUFFIX)
    if index.exists():
        return _open_index(index)
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}{path.suffix}" for i in range(1, count + 1)]
    return _open_shards(path, names)


def _open_shards(path: Path, names: list[str]) -> Checkpoint:
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}; "
            f"expected all of them in {path.parent}; download them into that folder"
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in names:
        shard = _open_single(path.with_name(name))
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            raise CheckpointError(_damaged(path, f"{min(twice)} is in more than one shard, again in {name}"))
        tensors.update(shard.tensors)
        metadata.update(shard.metadata)
    return Checkpoint(path, tensors, metadata)


def _model_in_folder(folder: Path) -> Path:
    """The one model of a folder: its index, its only file, or the first shard of its only set."""
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return indexes[0]
    files = sorted(folder.glob("*.safetensors"))
    sets = {match["stem"] if (match := SHARD_NAME.match(file.stem)) else file.name for file in files}
    if files and len(sets) == 1 and not indexes:
        return files[0]
    found = ", ".join(path.name for path in (indexes or files)[:4]) or "none"
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    inner = ", ".join(path.name for path in folders if any(path.glob("*.safetensors")))
    hint = f"one of its folders ({inner})" if inner and not files else "the file itself"
    raise CheckpointError(
        f"{folder}: a folder that does not hold just one safetensors model (found: {found}); "
        f"expected one file or one set of shards; choose {hint}"
    )


# --- other types -----------------------------------------------------------------------------------------


def _open_gguf(path: Path) -> Checkpoint:
    from ..linear.gguf import open_gguf  # there, because it builds on this file

    return open_gguf(path)


def _refuse_pickle(path: Path) -> Checkpoint:
    raise CheckpointError(
        f"{path}: a PyTorch pickle, which can run code when opened; expected safetensors; download the "
        ".safetensors version, or convert it where you trust it: "
        "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)`"
    )


# A new file type is one line here.
OPENERS: Mapping[str, Callable[[Path], Checkpoint]] = {
    ".safetensors": _open_safetensors,
    ".sft": _open_safetensors,
    ".json": _open_index,
    ".gguf": _open_gguf,
    ".pth": _refuse_pickle,
    ".pt": _refuse_pickle,
    ".bin": _refuse_pickle,
    ".ckpt": _refuse_pickle,
}


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
            raise CheckpointError(_truncated(info.file, expected, info.file.stat().st_size))
        position += count


def _truncated(path: Path, expected: str, actual: int) -> str:
    return (
        f"{path}: a truncated safetensors file, {actual:,} bytes; expected {expected} by its header; "
        "the download or copy was cut short: download it again"
    )


def _damaged(path: Path, detail: str) -> str:
    return f"{path}: a damaged file: {detail}; expected it to agree with itself; download it again"


def _unreadable(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{path}: cannot be read ({reason}); expected a readable model file; check that it exists and its rights"
