"""Safetensors files: one, or the shards of one model."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...system.bounded_json import JsonError, parse_json, read_json
from ...system.file_stamp import Stamp, stamp_of
from ...system.plain_text import short, shown
from ...system.regular_files import is_there, open_regular
from .checkpoint import IMPOSTORS, Checkpoint, CheckpointError, TensorInfo, damaged, truncated, unreadable

MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
MOST_INDEX_BYTES = 1 << 26
MOST_DIMS = 16  # any model has five at most
# What stands once in each object of a header; of tensors that come twice the last counts, as in the library.
ONCE = ("__metadata__", "dtype", "shape", "data_offsets")

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


def open_safetensors(path: Path) -> Checkpoint:
    shards = _shards_beside(path)
    return shards if shards is not None else open_single(path)


def open_single(path: Path) -> Checkpoint:
    """One file, judged as the safetensors library does: what that refuses is refused."""
    stamp = stamp_of(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(path, file, size)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: _tensor_info(path, name, entry, data_start, stamp) for name, entry in header.items()}
    _check_places(path, data_start, size, tensors.values())
    return Checkpoint(path, tensors, metadata)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON and the offset of the data that follows it."""
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
    if length > MOST_HEADER_BYTES:
        stated = f"it states a header of {length:,} bytes, the most is {MOST_HEADER_BYTES:,}"
        raise CheckpointError(damaged(path, stated))
    if 8 + length > size:
        raise CheckpointError(truncated(path, "safetensors", f"more than {8 + length:,}", size))
    file.seek(8)
    try:
        header = parse_json(file.read(length), MOST_HEADER_BYTES, ONCE)
    except JsonError as error:
        raise CheckpointError(damaged(path, f"its header is {error}")) from error
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not isinstance(texts, dict | None):
        raise CheckpointError(damaged(path, "its header is no table of tensors"))
    if bad := [key for key, value in (texts or {}).items() if not isinstance(value, str)]:
        raise CheckpointError(damaged(path, f"its metadata's {shown(bad[0])} is no text"))
    return header, 8 + length


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, stamp: Stamp | None) -> TensorInfo:
    stored, shape, place = _parts(path, name, entry)
    dtype = DTYPES.get(stored) if isinstance(stored, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: {short(name)} has the number format {shown(stored)}; expected one of {', '.join(DTYPES)}; "
            "choose another release of the model (fp8, fp16 or bf16)"
        )
    whole = all(type(number) is int and number >= 0 for number in (*shape, *place))
    if not whole or place[1] - place[0] != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            damaged(path, f"{short(name)} is {stored} {shown(shape)} but has the byte range {place[0]} to {place[1]}")
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + place[0], place[1] - place[0], stamp=stamp)


def _parts(path: Path, name: str, entry: Any) -> tuple[Any, list[Any], list[Any]]:
    """What an entry says of its tensor: number format, shape and byte range; lists, of whatever the file has."""
    fields = entry if isinstance(entry, dict) else {}
    shape, place = fields.get("shape"), fields.get("data_offsets")
    if "dtype" not in fields or not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        raise CheckpointError(damaged(path, f"the header's entry for {short(name)} is incomplete"))
    if len(shape) > MOST_DIMS:
        raise CheckpointError(damaged(path, f"{short(name)} has {len(shape)} dimensions"))
    return fields["dtype"], shape, place


def _check_places(path: Path, data_start: int, size: int, tensors: Iterable[TensorInfo]) -> None:
    """Tensors follow each other from the header to the end of the file, without a gap."""
    position, before = data_start, "the header"
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset < position:
            raise CheckpointError(damaged(path, f"the bytes of {before} and {short(info.name)} overlap"))
        if info.offset > position and info.offset <= size:
            raise CheckpointError(
                damaged(path, f"{info.offset - position:,} bytes before {short(info.name)} are no tensor's")
            )
        position, before = info.offset + info.nbytes, short(info.name)
    if position > size:
        raise CheckpointError(truncated(path, "safetensors", f"{position:,}", size))
    if position < size:
        raise CheckpointError(damaged(path, f"its last {size - position:,} bytes are no tensor's"))


SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})$")
INDEX_SUFFIX = ".safetensors.index.json"


def open_index(path: Path) -> Checkpoint:
    try:
        index = read_json(path, MOST_INDEX_BYTES)
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    except JsonError as error:
        raise CheckpointError(damaged(path, f"it is {error}")) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: a JSON file without a `weight_map`; expected x{INDEX_SUFFIX}; choose the .safetensors file"
        )
    if not all(isinstance(file, str) and _is_plain_name(file) for file in weight_map.values()):
        raise CheckpointError(damaged(path, "its weight_map names files outside its own folder"))
    merged = _open_shards(path, sorted(set(weight_map.values())))
    for name, file in weight_map.items():
        if name not in merged.tensors or merged.tensors[name].file.name != file:
            raise CheckpointError(
                f"{path}: says that {name} is in {file}, which does not hold it; "
                "expected the index and shards of one release; download both again"
            )
    return merged


def _is_plain_name(file: str) -> bool:
    """Whether a name is of a file in the same folder, on every system."""
    return file not in ("", ".", "..") and not set(file) & set("/\\:\0")


def _shards_beside(path: Path) -> Checkpoint | None:
    """The whole model when `path` is one of its shards, by its index or else by the shards' names."""
    match = SHARD_NAME.match(path.stem)
    if match is None:
        return None
    index = path.with_name(match["stem"] + INDEX_SUFFIX)
    if is_there(index):
        return open_index(index)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise CheckpointError(damaged(path, f"its name says that it is shard {int(match['number'])} of {count}"))
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}{path.suffix}" for i in range(1, count + 1)]
    return _open_shards(path, names)


def _open_shards(path: Path, names: list[str]) -> Checkpoint:
    missing = [name for name in names if not is_there(path.with_name(name))]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}; "
            f"expected all of them in {path.parent}; download them into that folder"
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in names:
        shard = open_single(path.with_name(name))
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            raise CheckpointError(damaged(path, f"{min(twice)} is in more than one shard, again in {name}"))
        tensors.update(shard.tensors)
        metadata.update(shard.metadata)
    return Checkpoint(path, tensors, metadata)


def model_in_folder(folder: Path) -> Path:
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
