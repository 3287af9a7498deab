"""GGUF files: their tensors, plain or packed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ...system.file_stamp import stamp_of
from ...system.plain_text import short, shown
from .checkpoint import Checkpoint, CheckpointError, TensorInfo, damaged, truncated, unreadable
from .gguf_header import GgufHeader, GgufTensor, read_gguf_header


@dataclass(frozen=True)
class PackedType:
    """One packed GGUF type: a block of it is so many elements of a row in so many bytes."""

    name: str
    elements: int
    nbytes: int


# Those that can be unpacked, see weights/kernels/gguf_reference.py.
PACKED_TYPES: Mapping[str, PackedType] = {
    name: PackedType(name, *GGML_QUANT_SIZES[GGMLQuantizationType[name]])
    for name in (
        "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS",
    )
}  # fmt: skip
PLAIN_TYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


# city96's converter stores some tensors flattened to 256 columns, and their real shape in a field of this name.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def open_gguf(path: Path) -> Checkpoint:
    """Open a `.gguf` file by reading its header only. Raises CheckpointError.

    Packed tensors are uint8 `[*rows, bytes per row]` with their type as `quant`; metadata is that of the file, as text.
    """
    stamp = stamp_of(path)
    header = read_gguf_header(path)
    num_parts = header.fields.get("split.count", 1)
    if num_parts not in (0, 1):
        raise CheckpointError(
            f"{path}: one of {shown(num_parts)} parts of a split GGUF file; expected the model in one "
            "file; join the parts with llama.cpp's `gguf-split --merge`, or download a single-file release"
        )
    tensors: dict[str, TensorInfo] = {}
    for tensor in header.tensors:
        if tensor.name in tensors:
            raise CheckpointError(damaged(path, f"it holds {short(tensor.name)} twice"))
        tensors[tensor.name] = replace(_tensor_info(path, header, tensor), stamp=stamp)
    _check_places(path, tensors.values())
    metadata = {key: str(value) for key, value in header.fields.items() if not key.startswith(ORIGINAL_SHAPE)}
    return Checkpoint(path, tensors, metadata)


def _check_places(path: Path, tensors: Iterable[TensorInfo]) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    position, before = 0, ""
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset < position:
            raise CheckpointError(damaged(path, f"the bytes of {before} and {short(info.name)} overlap"))
        position, before = info.offset + info.nbytes, short(info.name)
    if position > size:
        raise CheckpointError(truncated(path, "GGUF", f"{position:,}", size))


def _tensor_info(path: Path, header: GgufHeader, tensor: GgufTensor) -> TensorInfo:
    quant = _type_name(tensor.type_number)
    stated = header.fields.get(ORIGINAL_SHAPE + tensor.name, tensor.shape)
    shape = tuple(stated) if isinstance(stated, list | tuple) else ()
    if not all(type(size) is int and 0 < size < 2**63 for size in shape) or math.prod(shape) != math.prod(tensor.shape):
        raise CheckpointError(
            f"{path}: a damaged file: {short(tensor.name)} is stored as {list(tensor.shape)}; expected a shape of as "
            f"many elements as {shown(stated)}, which is given as its original one; download it again"
        )
    if quant in PLAIN_TYPES:
        dtype = PLAIN_TYPES[quant]
        return TensorInfo(tensor.name, dtype, shape, path, tensor.offset, math.prod(shape) * dtype.itemsize)
    block = PACKED_TYPES.get(quant)
    if block is None:
        raise CheckpointError(
            f"{path}: {short(tensor.name)} is stored as {quant}; expected one of "
            f"{', '.join([*PLAIN_TYPES, *PACKED_TYPES])}; choose another release of the model, such as Q4_K_M or Q8_0"
        )
    rows = shape
    if shape and shape[-1] % block.elements:  # packed in rows of other lengths, such as 256 columns
        rows = tensor.shape
    if not rows or rows[-1] % block.elements:
        raise CheckpointError(
            f"{path}: {short(tensor.name)} is {list(shape)} in {quant}; expected rows of a multiple of "
            f"{block.elements} elements; choose another release of the model, such as Q8_0"
        )
    stored = (*rows[:-1], rows[-1] // block.elements * block.nbytes)
    return TensorInfo(tensor.name, torch.uint8, stored, path, tensor.offset, math.prod(stored), quant, shape)


def _type_name(number: int) -> str:
    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"type number {number}"
