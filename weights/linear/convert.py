"""Writing a quantised checkpoint to a new safetensors file."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ...system.atomic_files import naming, partial_name, replace_file
from ...system.host_memory import allocate_bytes
from ...system.sizes import in_gib
from ..files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..files.safetensors import DTYPES
from .adopt import is_quantisation_name
from .dialects import HEADER_KEY, MARKER, OLD_MARKER
from .fitting import UNPACKED
from .quantize import CPU, FP8_ROWS, FP8_TENSORS, INT8_ROWS, Target, quantized_source

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class FileFormat:
    """How `convert` writes: what weights become, and what the scale is called."""

    target: Target
    scale: str
    marker: str | None = None  # of each layer: the text of its comfy_quant


# All can be read by ComfyUI: fp8 in its first dialect (scales per tensor), int8 in its present one (scales per row).
FILE_FORMATS: Mapping[str, FileFormat] = {
    "fp8": FileFormat(FP8_TENSORS, "scale_weight"),
    "fp8_rows": FileFormat(FP8_ROWS, "weight_scale"),
    "int8": FileFormat(INT8_ROWS, "weight_scale", json.dumps({"format": "int8_tensorwise"})),
}


def convert(
    checkpoint: Checkpoint,
    out_path: str | Path,
    file_format: str,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Path:
    """Write a quantised safetensors file, tensor by tensor, under its name once it is complete.

    `file_format`: "fp8" (a scale per tensor; ComfyUI reads it), "fp8_rows" (a scale per row: more accurate, not for
    ComfyUI), "int8" (a scale per row; ComfyUI reads it). `progress` is told once writing begins, and after each tensor.
    The file's folder is made. Raises ValueError for an unknown format or an unsuitable path, CheckpointError for a file
    that cannot be converted.
    """
    out_path = Path(out_path)
    how = FILE_FORMATS.get(file_format)
    if how is None:
        raise ValueError(f"cannot convert to {file_format!r}; expected one of {', '.join(FILE_FORMATS)}")
    _check_path(out_path)
    source = quantized_source(checkpoint, how.target, device)
    _check_convertible(source, checkpoint, file_format, how)
    entries = _entries(source, how)
    total = sum(info.nbytes for _, info, _ in entries)
    _make_folder(out_path)
    free = shutil.disk_usage(out_path.parent).free
    if free < total:
        raise ValueError(f"{out_path}: needs {in_gib(total)}, the disk has {in_gib(free)} free")
    part = partial_name(out_path)
    try:
        with naming(out_path), open(part, "xb") as file:
            _write(file, source, entries, progress, total)
            file.flush()
            os.fsync(file.fileno())
        replace_file(part, out_path)
    finally:
        part.unlink(missing_ok=True)
    return out_path


def parts_left_out(file: Checkpoint, converted: Checkpoint) -> str:
    """What a file holds beside the model that was opened of it, in words; "" where it is all of it."""
    taken = {_place(info) for info in converted.tensors.values()}
    names = [
        name
        for name, info in file.tensors.items()
        if math.prod(info.shape) > 1 and _place(info) not in taken and not is_quantisation_name(name)
    ]
    parts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{count} tensor{'' if count == 1 else 's'} of {part}" for part, count in parts.items())


def _place(info: TensorInfo) -> tuple[str, int]:
    return str(info.file).removesuffix(UNPACKED), info.offset


Entry = tuple[str, TensorInfo, bytes | None]  # name in the new file, tensor of the source, or the bytes of a marker


def _entries(source: Checkpoint, how: FileFormat) -> list[Entry]:
    entries: list[Entry] = []
    for name, info in source.tensors.items():
        layer, _, leaf = name.rpartition(".")
        entries.append((f"{layer}.{how.scale}" if leaf == "weight_scale" else name, info, None))
        if leaf == "weight" and info.quant is not None and how.marker is not None:
            text = how.marker.encode()
            entries.append((f"{layer}.{MARKER}", _marker_info(info, torch.uint8, len(text)), text))
    if how.scale == "scale_weight":
        # no elements: fp8 products are allowed
        entries.append((OLD_MARKER, _marker_info(entries[0][1], torch.float8_e4m3fn, 0), b""))
    return entries


def _marker_info(like: TensorInfo, dtype: torch.dtype, num_bytes: int) -> TensorInfo:
    return TensorInfo("", dtype, (num_bytes,), like.file, 0, num_bytes)


def _write(file: BinaryIO, source: Checkpoint, entries: list[Entry], progress: Progress | None, total: int) -> None:
    # backwards: where an older torch lacks a dtype, its stand-in has two names and the first is the usual one
    names = {dtype: name for name, dtype in reversed(list(DTYPES.items()))}
    header: dict[str, object] = {}
    position = 0
    for name, info, _ in entries:
        end = position + info.nbytes
        header[name] = {"dtype": names[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    metadata = {key: text for key, text in source.metadata.items() if key != HEADER_KEY}
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **header}).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    done, told = 0, progress or _nobody
    told(0, total)
    for _, info, marker in entries:
        if marker is not None:
            file.write(marker)
        else:
            raw = allocate_bytes(info.nbytes)
            source.read_into(info.name, raw)
            file.write(raw.numpy().data)
        done += info.nbytes
        told(done, total)


def _nobody(done: int, total: int) -> None:
    """Is told."""


def _check_path(path: Path) -> None:
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: the new file's name must end in .safetensors")
    if path.exists():
        raise ValueError(f"{path}: exists already; choose another name or delete it first")


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: no folder can be made there ({error.strerror}); choose another place") from error


def _check_convertible(source: Checkpoint, checkpoint: Checkpoint, file_format: str, how: FileFormat) -> None:
    if source is checkpoint:
        kind = file_format.partition("_")[0]
        raise CheckpointError(
            f"{checkpoint.path}: its blocks are {kind} already; expected bf16, fp16 or another format"
        )
    other = [info for info in source.tensors.values() if info.quant is not None and info.quant not in how.target.same]
    if other:
        raise CheckpointError(
            f"{checkpoint.path}: {other[0].name} and {len(other) - 1} more outside the blocks are stored as "
            f"{other[0].quant}, which a file in {file_format} cannot hold; convert the bf16 or fp16 version instead"
        )
