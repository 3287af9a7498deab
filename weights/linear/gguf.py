"""GGUF files, and linear weights stored in their packed types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from ..files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..files.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from ..kernels.gguf_op import dequantize_packed
from .gguf_reference import BLOCK_TYPES, BlockType
from .linear import Unpacked

PLAIN_TYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# city96's converter stores some tensors flattened to 256 columns, and their real shape in a field of this name.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def open_gguf(path: Path) -> Checkpoint:
    """Open a `.gguf` file by reading its header only. Raises CheckpointError.

    Packed tensors are uint8 `[*rows, bytes per row]` with their type as `quant`; metadata is that of the file, as text.
    """
    header = read_gguf_header(path)
    if header.fields.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: one of {header.fields['split.count']} parts of a split GGUF file; expected the model in one "
            "file; join the parts with llama.cpp's `gguf-split --merge`, or download a single-file release"
        )
    tensors: dict[str, TensorInfo] = {}
    for tensor in header.tensors:
        if tensor.name in tensors:
            raise CheckpointError(
                f"{path}: a damaged file: it holds {tensor.name} twice; expected once; download it again"
            )
        tensors[tensor.name] = _tensor_info(path, header, tensor)
    end = max((info.offset + info.nbytes for info in tensors.values()), default=0)
    size = path.stat().st_size
    if end > size:
        raise CheckpointError(
            f"{path}: a truncated GGUF file, {size:,} bytes; expected {end:,} by its header; "
            "the download or copy was cut short: download it again"
        )
    metadata = {key: str(value) for key, value in header.fields.items() if not key.startswith(ORIGINAL_SHAPE)}
    return Checkpoint(path, tensors, metadata)


def _tensor_info(path: Path, header: GgufHeader, tensor: GgufTensor) -> TensorInfo:
    quant = _type_name(tensor.type_number)
    stated = header.fields.get(ORIGINAL_SHAPE + tensor.name, tensor.shape)
    shape = tuple(stated) if isinstance(stated, list | tuple) else ()
    if not all(isinstance(size, int) and size > 0 for size in shape) or math.prod(shape) != math.prod(tensor.shape):
        raise CheckpointError(
            f"{path}: a damaged file: {tensor.name} is stored as {list(tensor.shape)}; expected a shape of as many "
            f"elements as {stated}, which is given as its original one; download it again"
        )
    if quant in PLAIN_TYPES:
        dtype = PLAIN_TYPES[quant]
        return TensorInfo(tensor.name, dtype, shape, path, tensor.offset, math.prod(shape) * dtype.itemsize)
    block = BLOCK_TYPES.get(quant)
    if block is None:
        raise CheckpointError(
            f"{path}: {tensor.name} is stored as {quant}; expected one of {', '.join([*PLAIN_TYPES, *BLOCK_TYPES])}; "
            "choose another release of the model, such as Q4_K_M or Q8_0"
        )
    if not shape or shape[-1] % block.elements:
        raise CheckpointError(
            f"{path}: {tensor.name} is {list(shape)} in {quant}; expected rows of a multiple of {block.elements} "
            "elements; choose another release of the model, such as Q8_0"
        )
    row_bytes = shape[-1] // block.elements * block.nbytes
    stored = (*shape[:-1], row_bytes)
    return TensorInfo(tensor.name, torch.uint8, stored, path, tensor.offset, math.prod(stored), quant, shape)


def _type_name(number: int) -> str:
    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"type number {number}"


# --- the weight format -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufFormat(Unpacked):
    """A weight packed in one GGUF type: `packed["weight"]` is uint8 `[out, bytes per row]`.

    It is unpacked once per `prepare`, then multiplied as a dense one.
    """

    block: BlockType

    @property
    def name(self) -> str:
        return self.block.name

    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        weight = packed["weight"]
        if out is None:
            out = torch.empty(self.logical_shape(weight), dtype=dtype, device=weight.device)
        dequantize_packed(weight, out, self.name)
        return out

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (*weight.shape[:-1], weight.shape[-1] // self.block.nbytes * self.block.elements)


GGUF_FORMATS: Mapping[str, GgufFormat] = {name: GgufFormat(block) for name, block in BLOCK_TYPES.items()}
