"""The Triton kernels of 8-bit rows as operators that torch.compile leaves alone; off the GPU the torch reference."""

# No `from __future__ import annotations`: torch.library reads the annotations themselves.
from typing import Sequence  # noqa: UP035 - torch 2.4 knows no other, nor list[int]

import torch
from torch import Tensor

from ...system.operators import on_device_of, returns_nothing
from ..linear.rows import QuantizedRows, RowOps, TorchRowOps


@torch.library.custom_op("lowvram_video::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in `dtype`, int8 or float8_e4m3fn, and scales; see `RowOps`."""
    with on_device_of(x):
        ops = _ops_for(x)
        return ops.quantize_int8(x) if dtype == torch.int8 else ops.quantize_fp8(x)


@quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("lowvram_video::dequantize_rows", mutates_args=("out",))
def dequantize_rows(values: Tensor, scales: Tensor, out: Tensor) -> None:
    """See `RowOps.dequantize`."""
    with on_device_of(out):
        _ops_for(out).dequantize(values, scales, out)


@torch.library.custom_op("lowvram_video::rescale_rows", mutates_args=("out",))
def rescale_rows(product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See `RowOps.rescale`."""
    with on_device_of(out):
        _ops_for(out).rescale(product, rows, columns, bias, out)


@torch.library.custom_op("lowvram_video::multiply_int8", mutates_args=("out",))
def multiply_int8(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    tile: Sequence[int],
    out: Tensor,
) -> None:
    """See `gemms.Gemm`; `tile` holds the fields of an `int8_gemm.Tile`."""
    from ..linear.gemms import ReferenceGemm

    rows = QuantizedRows(values, scales, values.shape, out.dtype)
    if not out.is_cuda:
        ReferenceGemm()(rows, weight, columns, bias, out)
        return
    from .int8_gemm import Int8Triton, Tile

    with on_device_of(out):
        Int8Triton(Tile(*tile))(rows, weight, columns, bias, out)


for _operator in (dequantize_rows, rescale_rows, multiply_int8):
    _operator.register_fake(returns_nothing)


def _ops_for(x: Tensor) -> RowOps:
    if not x.is_cuda:
        return TorchRowOps()
    from .rows import TritonRowOps

    return TritonRowOps(fp8=torch.cuda.get_device_capability(x.device) >= (8, 9))
