"""int8 weights, multiplied with activations that are quantised to int8 row by row (W8A8).

`weight [out, in]` is int8, `weight_scale` is fp32 of shape [], [1], [out] or [out, 1]. In files with ConvRot, groups of
input features were rotated by an orthogonal matrix before they were quantised, which spreads outliers; activations are
rotated the same way as they come. Source of that: ComfyUI's comfy-kitchen (`tensor/int8_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..files.checkpoint import TensorInfo
from ..kernels.gemms import Gemm, ReferenceGemm
from ..kernels.late_rows import GivenRows, tensor_of
from ..kernels.row_reference import RowOps, TorchRowOps
from .fp8 import MultipliedRows, column_scales
from .weight_format import WeightFormat

INT8 = "int8"
ROTATED = re.compile(r"int8 convrot (\d+)")  # and the size of a group


@dataclass(frozen=True)
class Int8Dequantized(WeightFormat):
    """The weight is unpacked into scratch and multiplied in the compute dtype. `rotation`: features per group or 0."""

    rotation: int = 0
    ops: RowOps = field(default_factory=TorchRowOps)

    splits = True

    @property
    def name(self) -> str:
        return f"int8 convrot {self.rotation}" if self.rotation else INT8

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        weight = packed["weight"]
        if not self.rotation:
            return self.ops.dequantize(weight, packed["weight_scale"], out)
        matrix = rotation_matrix(self.rotation, out.device)
        step = max(1, (1 << 22) // out.shape[1])  # rows at a time: in fp32 they take four times the weight's bytes
        scales = column_scales(weight, packed["weight_scale"])[:, None].split(step)
        for part, values, scale in zip(out.split(step), weight.split(step), scales, strict=True):
            part.copy_(rotate(values.float() * scale, matrix))
        return out


@dataclass(frozen=True)
class Int8Matmul(MultipliedRows):
    """int8 times int8: activations are quantised (and rotated, if the weight is) row by row as they come."""

    rotation: int = 0
    gemm: Gemm = field(default_factory=ReferenceGemm)
    ops: RowOps = field(default_factory=TorchRowOps)
    name: str = "int8 matmul"

    multiple = 8

    @property
    def form(self) -> str:
        return f"int8 rows rotated by {self.rotation}"

    @property
    def takes_late_rows(self) -> bool:
        return not self.rotation and self.ops.quantizes_late(torch.int8)

    def row_bytes(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """The row rotated too, where it is."""
        rotated = packed["weight"].shape[1] * dtype.itemsize if self.rotation else 0
        return super().row_bytes(packed, dtype) + rotated

    def quantize(self, rows: GivenRows) -> tuple[Tensor, Tensor]:
        if self.rotation:
            rows = tensor_of(rows)
            rows = rotate(rows, rotation_matrix(self.rotation, rows.device).to(rows.dtype))
        return self.ops.quantize(rows, torch.int8)

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        return Int8Dequantized(self.rotation, self.ops).unpack(packed, out)


def rotation_matrix(size: int, device: torch.device) -> Tensor:
    """The orthogonal, symmetric `[size, size]` matrix of ConvRot, fp32: a Kronecker power; `size` is a power of 4."""
    base = torch.ones(4, 4, device=device)
    base -= 2 * torch.eye(4, device=device).flip(1)
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, base)
    assert matrix.shape[0] == size, "checked where the file's marker is read"
    return matrix / size**0.5


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """`x [rows, in]` with every group of features multiplied by `matrix`; twice is the identity."""
    return (x.unflatten(1, (-1, matrix.shape[0])) @ matrix).flatten(1)


def recognise_int8(weight: TensorInfo) -> Int8Dequantized | None:
    """The format of an int8 weight; see `dialects.py` for how files say so."""
    rotated = ROTATED.fullmatch(weight.quant or "")
    if weight.quant != INT8 and rotated is None:
        return None
    return Int8Dequantized(int(rotated[1]) if rotated else 0)
