"""The steps over rows of 8-bit numbers on a device: Triton kernels where they are right, else PyTorch.

In compiled code the kernels are operators, which torch.compile calls and does not look into.
"""

# No `from __future__ import annotations`: torch.library reads the annotations themselves.
import torch
from torch import Tensor

from ...system.dtypes import half_dtype
from ...system.kernel_choice import Trial, choose, disagreement, loaded, relative_error
from ...system.operators import on_device_of, returns_nothing
from .late_rows import GivenRows
from .row_reference import LARGEST, SMALLEST_SCALE, RowOps, TorchRowOps


def select_row_ops(device: torch.device) -> RowOps:
    """Triton kernels on a GPU where they compile and agree with PyTorch; else PyTorch."""
    reference = TorchRowOps()
    if device.type != "cuda":
        return reference
    trial: Trial[RowOps] = Trial("rows of 8-bit numbers", device, lambda ops: _disagreement(ops, reference, device))
    return choose(trial, loaded(trial.what, lambda: [_triton(device)]), reference).best


def _triton(device: torch.device) -> RowOps:
    return TritonRowOps(fp8=torch.cuda.get_device_capability(device) >= (8, 9))


def _disagreement(ops: RowOps, reference: RowOps, device: torch.device) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(6, 192, generator=generator, device=device, dtype=half_dtype(device))
    results = []
    for each in (ops, reference):
        parts = []
        for values, scales in (each.quantize(x, dtype) for dtype in (torch.int8, torch.float8_e4m3fn)):
            parts.append(each.dequantize(values, scales, torch.empty_like(x)))
            parts.append(each.rescale(x, scales, x[0].float(), x[1], torch.empty_like(x)))
        results.append(torch.cat(parts))
    return disagreement(relative_error(*results))


class TritonRowOps:
    """See `RowOps` for what each step computes. `fp8`: the GPU casts to fp8 (compute capability 8.9)."""

    name = "triton"

    def __init__(self, fp8: bool):
        from . import row_kernels

        self.kernels, self.fp8 = row_kernels, fp8

    def quantize(self, x: GivenRows, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor):
            if out is None and self.quantizes_late(dtype):
                return x.quantized(dtype, LARGEST[dtype], SMALLEST_SCALE)
            x = x.tensor()
        if torch.compiler.is_compiling():
            values, scales = quantize_rows(x, dtype)
            return values if out is None else out.copy_(values), scales
        if dtype.is_floating_point and not self.fp8:
            return TorchRowOps().quantize(x, dtype, out)
        return self.kernels.launch_quantize(x, dtype, out)

    def quantizes_late(self, dtype: torch.dtype) -> bool:
        return self.fp8 or not dtype.is_floating_point

    def dequantize(self, values: Tensor, scales: Tensor | None, out: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            dequantize_rows(values, torch.ones(1, device=values.device) if scales is None else scales, out)
        elif values.element_size() == 1:
            self.kernels.launch_dequantize(values, scales, out)
        else:
            TorchRowOps().dequantize(values, scales, out)
        return out

    def rescale(self, product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        rescale = rescale_rows if torch.compiler.is_compiling() else self.kernels.launch_rescale
        rescale(product, rows, columns, bias, out)
        return out


@torch.library.custom_op("lowvram_video::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in `dtype`, int8 or float8_e4m3fn, and scales; see `RowOps`."""
    with on_device_of(x):
        return _ops_for(x).quantize(x, dtype)


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


for _operator in (dequantize_rows, rescale_rows):
    _operator.register_fake(returns_nothing)


def _ops_for(x: Tensor) -> RowOps:
    return _triton(x.device) if x.is_cuda else TorchRowOps()
