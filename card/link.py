"""Copies between host and device, and within the device: how fast each way is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..memory.stream.pinned import CudaRegistrar
from ..system.card_profile import D2H_PINNED, H2D_PAGEABLE, H2D_PINNED, WAYS, WITHIN, LinkRow
from ..system.host_memory import allocate_extent
from .clock import attempted, median_seconds

COPY_BYTES, QUICK_COPY_BYTES = 256 << 20, 64 << 20
PINNED = (H2D_PINNED, D2H_PINNED)
TO_DEVICE = (H2D_PINNED, H2D_PAGEABLE)


def measure_link(device: torch.device, nbytes: int) -> Iterator[LinkRow]:
    """One row for each way, as it is done; on a CPU only copies within RAM."""
    ways = WAYS if device.type == "cuda" else (WITHIN,)
    yield from (_measured(way, device, nbytes) for way in ways)


def _measured(way: str, device: torch.device, nbytes: int) -> LinkRow:
    found = attempted(lambda: _gbps(way, device, nbytes), 2 * nbytes, device)
    return LinkRow(way, problem=found) if isinstance(found, str) else LinkRow(way, round(found, 3))


def _gbps(way: str, device: torch.device, nbytes: int) -> float:
    there = torch.ones(nbytes, dtype=torch.uint8, device=device)
    if way == WITHIN:
        other = torch.empty_like(there)
        return 2 * nbytes / 1e9 / median_seconds(lambda: other.copy_(there), device)  # read and written
    here = allocate_extent(nbytes)[:nbytes].fill_(1)
    if way not in PINNED:
        return nbytes / 1e9 / _seconds(way, here, there, device)
    registrar = CudaRegistrar(device)
    if not registrar.pin(here):
        raise RuntimeError("the system refused to pin memory")
    try:
        return nbytes / 1e9 / _seconds(way, here, there, device)
    finally:
        registrar.unpin(here)


def _seconds(way: str, here: Tensor, there: Tensor, device: torch.device) -> float:
    source, target = (here, there) if way in TO_DEVICE else (there, here)
    return median_seconds(lambda: target.copy_(source, non_blocking=way in PINNED), device)
