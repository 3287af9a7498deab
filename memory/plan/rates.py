"""How fast this machine computes and copies, measured in a moment: a plan made of real rates chooses better."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ...system.device_errors import is_out_of_memory
from ...system.dtypes import half_dtype
from ...system.host_memory import allocate_extent
from ...system.kernel_choice import cuda_seconds
from ..stream.pinned import CudaRegistrar

logger = logging.getLogger(__name__)

COPY_BYTES = 64 << 20
MATMUL_SIZE = 4096
ATTENTION_TOKENS = 4096
ATTENTION_SHARE = 0.8  # long sequences reach a little more than this short probe shows; other GPUs' kernels less


@dataclass(frozen=True)
class Rates:
    """Decimal units: TFLOP/s of half-precision products and attention, GB/s from pinned RAM."""

    tflops_matmul: float
    tflops_attention: float
    h2d_gbps: float


def measure_rates(device: torch.device) -> Rates | None:
    """Time a product, an attention and a copy on an idle CUDA device; about a tenth of a second, 200 MiB.

    In the 16 bits that the device computes in. None where the device has no memory left for it: plans are then made at
    the rates that `Limits` assumes.
    """
    try:
        return _measure(device, half_dtype(device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.info("%s has no memory left to time it: the plan assumes a card's usual speed.", device)
        return None


def _measure(device: torch.device, dtype: torch.dtype) -> Rates:
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
    product = cuda_seconds(lambda: torch.mm(a, a), device)
    q = torch.randn(1, 8, ATTENTION_TOKENS, 128, device=device, dtype=dtype)
    attention = cuda_seconds(lambda: F.scaled_dot_product_attention(q, q, q), device)
    host, there = allocate_extent(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    registrar = CudaRegistrar(device)
    pinned = registrar.pin(host)
    try:
        copy = cuda_seconds(lambda: there.copy_(host, non_blocking=True), device)
    finally:
        if pinned:
            registrar.unpin(host)
    return Rates(
        tflops_matmul=2 * MATMUL_SIZE**3 / product / 1e12,
        tflops_attention=4 * 8 * ATTENTION_TOKENS**2 * 128 / attention / 1e12 / ATTENTION_SHARE,
        h2d_gbps=COPY_BYTES / copy / 1e9,
    )
