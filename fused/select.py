"""Which implementation runs the elementwise steps on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..system.dtypes import half_dtype
from ..system.kernel_choice import Trial, choose, disagreement, loaded, relative_error
from .eager import EagerOps
from .opaque import OpaqueOps
from .ops import SMALLEST_SCALE, FusedOps, NormedRows, Rope


def select_fused_ops(device: torch.device) -> FusedOps:
    """Triton kernels on a GPU where they compile and agree with the eager reference; else eager PyTorch."""
    eager = EagerOps()
    if device.type != "cuda":
        return eager
    trial: Trial[FusedOps] = Trial("elementwise steps", device, lambda ops: _disagreement(ops, eager, device))
    return choose(trial, loaded(trial.what, _triton), eager).best


def _triton() -> Sequence[FusedOps]:
    from .triton_ops import TritonOps

    return (TritonOps(OpaqueOps()),)


def _disagreement(ops: FusedOps, reference: FusedOps, device: torch.device) -> str | None:
    generator = torch.Generator(device).manual_seed(0)

    def rand(*shape: int, dtype: torch.dtype = half_dtype(device)) -> Tensor:  # noqa: B008 - of this call
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    x, weight, modulation = rand(6, 256), rand(256), rand(2, 256, dtype=torch.float32)
    casts_to_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
    kind, largest = (torch.float8_e4m3fn, 448.0) if casts_to_fp8 else (torch.int8, 127.0)
    rope = Rope(rand(6, 64, dtype=torch.float32), rand(6, 64, dtype=torch.float32))
    results = []
    for each in (ops, reference):
        y = each.modulated_norm(x, modulation, modulation, 1, 4, 1e-6)
        each.rms_norm_(y, weight, 1e-6, rope, 0)
        each.rms_norm_(y, weight[:128], 1e-6, rope, 2)
        each.rms_norm_(y, weight[:64], 1e-6, None, 0)
        each.gelu_(y)
        values, scales = torch.empty(6, 2, 128, dtype=torch.int8, device=device), torch.empty(6, 2, device=device)
        each.pack_normed(y.clone(), weight, 1e-6, rope, 0, values, scales)
        each.gated_add_(y, (values * scales[..., None]).view(y.shape).to(y.dtype), modulation, 0, 4)
        each.pack_heads(y.view(6, 2, 128), values, scales)
        each.unpack_heads(values[:, 1:], scales[:, 1:], y.view(6, 2, 128)[:, :1])
        each.gated_add_(y, each.affine_norm(x, weight, weight, 1e-6), modulation, 1, 4)
        values, scales = each.quantize_normed(NormedRows(each, x, weight, weight, 1e-6), kind, largest, SMALLEST_SCALE)
        results.append(torch.cat([y, (values.float() * scales).to(y.dtype)]))
    return disagreement(relative_error(*results))
