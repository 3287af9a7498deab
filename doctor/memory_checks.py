"""Memory and what moves it: VRAM, RAM, what of it can be pinned, the link, the disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ..card.clock import free_bytes, memory_bytes
from ..card.disk import QUICK_READ_BYTES, measure_disk
from ..card.link import QUICK_COPY_BYTES, measure_link
from ..memory.stream.pinned import CudaRegistrar, default_pinned_cap
from ..system.card_profile import D2H_PINNED, H2D_PAGEABLE, H2D_PINNED, profile_of
from ..system.host_memory import allocate_extent, available_ram_bytes, total_ram_bytes
from ..system.kernel_choice import brief
from ..system.sizes import GIB, in_gib
from .finding import Finding
from .installed import Installed

PART = "Memory"
LEAST_VRAM = 3 * GIB  # below, no published model's leanest plan fits beside a desktop
LEAST_RAM = 8 * GIB
TRIED_PIN_BYTES = 256 << 20
SLOW_LINK = 6.0  # GB/s: PCIe 3.0 x16 has 12, 4.0 x8 as much; less is a slot with few lanes
SLOW_DISK = 0.5  # GB/s
SHOWN_WAYS = (H2D_PINNED, H2D_PAGEABLE, D2H_PINNED)


def check_memory(here: Installed, device: torch.device, models: Path | None) -> Iterator[Finding]:
    """`models` is a folder of model files whose disk is read; None: no disk is."""
    if device.type == "cuda":
        yield _vram(device)
        if here.platform == "win32":
            yield _fallback()
    yield _ram()
    if device.type == "cuda":
        yield _pinnable(device)
        yield from _link(device)
        yield _card_profile(device)
    if models is not None:
        yield from _disk(models)
    yield _room()


def _vram(device: torch.device) -> Finding:
    free, total = free_bytes(device), memory_bytes(device)
    text = f"{in_gib(free)} of {in_gib(total)} free"
    if free < LEAST_VRAM:
        return Finding(PART, "VRAM", "bad", text, "close what else uses the GPU: games, browsers, other Pythons")
    return Finding(PART, "VRAM", "good", text)


def _fallback() -> Finding:
    text = "the driver takes RAM where VRAM runs out, ten times slower, unless it is told not to; nothing can ask it"
    fix = (
        "NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback; or a "
        "vram_budget_gb half a GiB below what is free"
    )
    return Finding(PART, "shared memory", "told", text, fix)


def _ram() -> Finding:
    free, total = available_ram_bytes(), total_ram_bytes()
    swap = 0
    with suppress(OSError, RuntimeError):
        swap = psutil.swap_memory().total
    text = f"{in_gib(free)} of {in_gib(total)} free, {in_gib(swap)} of swap"
    if total < LEAST_RAM:
        return Finding(PART, "RAM", "bad", text, "models are read from the disk in every step then: take a fast one")
    return Finding(PART, "RAM", "good", text)


def _pinnable(device: torch.device) -> Finding:
    """The cap, and whether the driver pins anything at all."""
    cap = min(default_pinned_cap(), available_ram_bytes())
    registrar, extent = CudaRegistrar(device), allocate_extent(TRIED_PIN_BYTES)
    try:
        if not registrar.pin(extent):
            raise RuntimeError("the system refuses")
        registrar.unpin(extent)
    except (RuntimeError, OSError) as error:
        text = f"not {TRIED_PIN_BYTES >> 20} MiB can be pinned ({brief(error)}): copies are slower"
        return Finding(PART, "pinned RAM", "bad", text, "free some RAM, and raise `ulimit -l` where it is set")
    return Finding(PART, "pinned RAM", "good", f"up to {cap / GIB:.1f} GiB of what is free")


def _link(device: torch.device) -> Iterator[Finding]:
    rows = {row.way: row for row in measure_link(device, QUICK_COPY_BYTES)}
    for way in SHOWN_WAYS:
        row = rows[way]
        if row.gbps is None:
            yield Finding(PART, way, "bad", row.problem or "not measured", "close what else uses GPU and RAM")
        elif way == H2D_PINNED and row.gbps < SLOW_LINK:
            fix = "put the card into a slot with 16 lanes, and its power plan to high: streamed weights wait for it"
            yield Finding(PART, way, "bad", f"{row.gbps:.1f} GB/s", fix)
        else:
            yield Finding(PART, way, "good", f"{row.gbps:.1f} GB/s")


def _card_profile(device: torch.device) -> Finding:
    profile = profile_of(device)
    if profile is None:
        text = "plans guess this card's times, as it was not measured"
        return Finding(PART, "card profile", "told", text, "lowvram-video bench --quick (a minute)")
    return Finding(PART, "card profile", "good", f"measured {profile.date}, with this torch and driver")


def _disk(models: Path) -> Iterator[Finding]:
    for row in measure_disk(models, QUICK_READ_BYTES):
        if row.gbps is None:
            yield Finding(PART, "models' disk", "told", row.problem or "not measured")
            continue
        how = "past the page cache" if row.direct else "through the page cache"
        slow = row.gbps < SLOW_DISK
        fix = "models that do not fit in RAM stream from it: put them on an SSD" if slow else ""
        yield Finding(PART, "models' disk", "bad" if slow else "good", f"{row.gbps:.2f} GB/s {how}", fix)


def _room() -> Finding:
    """Where weights that are made while reading go, and FramePack's frames."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    text = f"{in_gib(free)} free for temporary files"
    if free < 2 * GIB:
        return Finding(PART, "temporary folder", "bad", text, "free some space, or set TMPDIR (on Windows TEMP)")
    return Finding(PART, "temporary folder", "good", text)
