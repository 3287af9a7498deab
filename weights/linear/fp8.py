"""Scaled fp8 weights: 8-bit floats and one scale for the tensor or for each row.

`weight [out, in]` is float8_e4m3fn or float8_e5m2, `weight_scale` is fp32 of shape [], [1], [out] or [out, 1]; the
file's dialect is undone in `dialects.py`. A weight cast to fp8 without a scale is a plain one, or one of scale 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..files.checkpoint import TensorInfo
from ..kernels.gemms import Gemm, ReferenceGemm
from ..kernels.late_rows import GivenRows
from ..kernels.row_reference import QuantizedRows, RowOps, TorchRowOps
from .projection import Projection, Scratch
from .weight_format import MultipliedAsStored, WeightFormat

FP8 = "fp8 scaled"
FP8_FULL_PRECISION = "fp8 scaled, full precision"  # the file asks for multiplication in the compute dtype


@dataclass(frozen=True)
class Fp8Dequantized(WeightFormat):
    """The weight is unpacked into scratch in one pass and multiplied in the compute dtype: any GPU, exact."""

    full_precision: bool = False
    ops: RowOps = field(default_factory=TorchRowOps)

    splits = True

    @property
    def name(self) -> str:
        return FP8_FULL_PRECISION if self.full_precision else FP8

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        return self.ops.dequantize(packed["weight"], packed["weight_scale"], out)


class MultipliedRows(MultipliedAsStored):
    """What formats share that multiply a weight as it is stored, with rows that are quantised as they come."""

    gemm: Gemm
    copies_rows = True

    @property
    @abstractmethod
    def form(self) -> str:
        """See `Projection.form`."""

    @abstractmethod
    def quantize(self, rows: GivenRows) -> tuple[Tensor, Tensor]:
        """The values and scales of `rows [rows, in]`."""

    def row_bytes(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """Its numbers in 8 bits, with a scale."""
        return packed["weight"].shape[1] + torch.float32.itemsize

    @property
    def product_bytes(self) -> int:
        return self.gemm.scratch_bytes

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        weight = packed["weight"]
        return RowsProjection(weight, column_scales(weight, packed.get("weight_scale")), bias, self)


class RowsProjection(Projection):
    """`x @ weight.T + bias` with both in 8 bits."""

    copies_rows = True

    def __init__(self, weight: Tensor, columns: Tensor, bias: Tensor | None, how: MultipliedRows):
        self.weight, self.columns, self.bias, self.how = weight, columns, bias, how
        self.form = how.form

    def quantize(self, x: GivenRows) -> QuantizedRows:
        values, scales = self.how.quantize(x.reshape(-1, x.shape[-1]) if isinstance(x, Tensor) else x)
        return QuantizedRows(values, scales, x.shape, x.dtype)

    def multiply(self, rows: QuantizedRows, out: Tensor | None = None) -> Tensor:
        weight = self.weight
        if out is None:
            out = torch.empty(*rows.shape[:-1], weight.shape[0], dtype=rows.dtype, device=weight.device)
        self.how.gemm(rows, weight, self.columns, self.bias, out.view(-1, weight.shape[0]))
        return out


@dataclass(frozen=True)
class Fp8Matmul(MultipliedRows):
    """fp8 times fp8: activations are quantised row by row as they come. e4m3fn weights, dimensions in sixteens."""

    gemm: Gemm = field(default_factory=ReferenceGemm)
    ops: RowOps = field(default_factory=TorchRowOps)
    unscaled: bool = False  # a plain cast: its scale is 1
    name: str = "fp8 matmul"

    form = "fp8 rows"

    @property
    def takes_late_rows(self) -> bool:
        return self.ops.quantizes_late(torch.float8_e4m3fn)

    def quantize(self, rows: GivenRows) -> tuple[Tensor, Tensor]:
        return self.ops.quantize(rows, torch.float8_e4m3fn)

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        weight = packed["weight"]
        return self.ops.dequantize(weight, column_scales(weight, packed.get("weight_scale")), out)

    def row_bytes(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """The product in bf16 too, where it is wanted in fp16: these products write no such."""
        beside = packed["weight"].shape[0] * torch.bfloat16.itemsize if dtype == torch.float16 else 0
        return super().row_bytes(packed, dtype) + beside

    def suits(self, packed: Mapping[str, Tensor]) -> bool:
        return packed["weight"].dtype == torch.float8_e4m3fn and super().suits(packed)


def column_scales(weight: Tensor, scale: Tensor | None) -> Tensor:
    """`[out]` fp32, from the scale of a tensor or of its rows; no scale is 1."""
    if scale is None:
        return torch.ones(weight.shape[0], device=weight.device)
    return scale.float().reshape(-1).expand(weight.shape[0]).contiguous()


def recognise_fp8(weight: TensorInfo) -> Fp8Dequantized | None:
    """The format of a scaled fp8 weight; see `dialects.py` for how files say so."""
    if weight.quant not in (FP8, FP8_FULL_PRECISION):
        return None
    return Fp8Dequantized(full_precision=weight.quant == FP8_FULL_PRECISION)
