"""Decoding a section's latents in the memory that there is: whole, with its clips in host memory, or in tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..diffusion.pictures import to_uint8
from ..host_memory import allocate_extent
from ..memory.pinned import PinnedBudget, Registrar
from .vae import HunyuanVAE, decode_footprint
from .vae_frames import CheckedStore, DeviceStore, FrameStore, SpillStore
from .vae_tiles import OVERLAP, TEMPORAL_TILE, decode_tiled

logger = logging.getLogger(__name__)

TILES = (512, 448, 384, 320, 256, 192, 128)  # pixels
HEADROOM_BYTES = 256 << 20  # cuDNN's workspaces, and what the allocator cannot fit together again
OnChunk = Callable[[int, int], None]  # (parts done, parts in all), before every frame too; may raise to stop


@dataclass(frozen=True)
class DecodeRoom:
    """Bytes that decoding may take beside the weights: of the device, and of host memory, pinned by `registrar`."""

    device_bytes: int
    host_bytes: int = 0
    registrar: Registrar | None = None


@dataclass(frozen=True)
class DecodeWay:
    """`tile` 0 is the whole frame; `spill` keeps surplus clips in host memory; `temporal` tiles cut time as well."""

    tile: int = 0
    spill: bool = False
    temporal: bool = False

    def __str__(self) -> str:
        if not self.tile:
            return "whole, with clips in host memory" if self.spill else "whole"
        return f"in tiles of {self.tile} pixels" + (" and 16 latents" if self.temporal else "")


def decode_ways(vae: HunyuanVAE, latents: Tensor, room: DecodeRoom | None) -> list[DecodeWay]:
    """How these latents may be decoded, the most exact first; None is room for anything.

    Whole frames are exact, wherever their clips lie. Tiles are not, as norms see the tile alone: larger ones and ones
    over the whole time are closer.
    """
    if room is None:
        return [DecodeWay()]
    stride = vae.config.spatial_stride
    frames, height, width = latents.shape[2], *(stride * side for side in latents.shape[3:])
    whole = decode_footprint(vae.config, frames, height, width, vae.dtype.itemsize)
    free = room.device_bytes - HEADROOM_BYTES
    ways = []
    if whole.total_bytes <= free:
        ways.append(DecodeWay())
    if whole.scratch_bytes <= free and whole.clip_bytes <= room.host_bytes:
        ways.append(DecodeWay(spill=True))
    for tile in TILES:
        sides = min(tile, height), min(tile, width)
        part = decode_footprint(vae.config, frames, *sides, vae.dtype.itemsize)
        if tile < max(height, width) and part.total_bytes <= free:
            ways.append(DecodeWay(tile))
    return [*ways, DecodeWay(256, temporal=True), DecodeWay(128, temporal=True)]


def decode_section(
    vae: HunyuanVAE,
    latents: Tensor,
    room: DecodeRoom | None = None,
    on_chunk: OnChunk | None = None,
    tile: int = 0,
) -> Tensor:
    """Frames `[T, H, W, 3]`, uint8 on the CPU, of `latents [1, 16, t, h, w]`, in the most exact way that fits.

    `tile` pixels instead, where given.
    """
    ways = decode_ways(vae, latents, room)
    if tile and tile < vae.config.spatial_stride * max(latents.shape[3:]):
        ways = [DecodeWay(tile), *(way for way in ways if way.tile and way.tile < tile)]
    for index, way in enumerate(ways):
        try:
            logger.info("decoding %s", way)
            video = _decode(vae, latents, way, room, on_chunk)
            return to_uint8(video)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            if index == len(ways) - 1:
                raise
            memory = "RAM" if isinstance(error, MemoryError) else "VRAM"
        logger.warning("out of %s while decoding %s: next %s", memory, way, ways[index + 1])
        torch.cuda.empty_cache()
    raise AssertionError("there is always a way")


def _decode(
    vae: HunyuanVAE, latents: Tensor, way: DecodeWay, room: DecodeRoom | None, on_chunk: OnChunk | None
) -> Tensor:
    if way.tile:
        overlap, frames = min(OVERLAP, way.tile // 2), TEMPORAL_TILE if way.temporal else None
        return decode_tiled(vae, latents, way.tile, overlap, temporal_tile=frames, on_chunk=on_chunk)
    check = None if on_chunk is None else partial(on_chunk, 0, 1)
    if not way.spill or room is None:
        return vae.decode(latents, _checked(DeviceStore(), check))
    with _host_memory(room) as allocate:
        return vae.decode(latents, _checked(SpillStore(0, allocate), check)).cpu()


def _checked(store: FrameStore, check: Callable[[], None] | None) -> FrameStore:
    return store if check is None else CheckedStore(store, check)


@contextmanager
def _host_memory(room: DecodeRoom) -> Iterator[Callable[[int], Tensor]]:
    """Host memory for clips, given back at the end; pinned where that is allowed, as copies then take a fifth."""
    extents: list[Tensor] = []
    budget = None if room.registrar is None else PinnedBudget(room.registrar, room.host_bytes)

    def allocate(nbytes: int) -> Tensor:
        extent = allocate_extent(nbytes)
        if budget is not None and budget.pin(extent) is None:
            extents.append(extent)
        return extent[:nbytes]

    try:
        yield allocate
    finally:
        if room.registrar is not None and extents:
            torch.cuda.synchronize()
        for extent in extents:
            assert budget is not None
            budget.unpin(extent)
