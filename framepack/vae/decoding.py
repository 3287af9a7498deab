"""Decoding a section's latents in the memory that there is: whole, with its clips in host memory, or in tiles."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...memory.plan.tiles import fitting_tile
from ...memory.stream.pinned import Registrar
from ...vae.frame_watch import watched
from ...vae.retries import first_fitting
from ...vae.strips import pinned_memory
from ...vae.tiling import WHOLE, OnChunk, Tile, decode_tiled, encode_tiled, retry_tiles
from ...video.pictures import to_uint8
from .frames import FrameStore
from .model import DecodeFootprint, HunyuanVAE, decode_footprint

logger = logging.getLogger(__name__)

HEADROOM_BYTES = 256 << 20  # cuDNN's workspaces, and what the allocator cannot fit together again


@dataclass(frozen=True)
class DecodeBudget:
    """Bytes that decoding may take beside the weights: of the device, and of host memory, pinned by `registrar`."""

    device_bytes: int
    host_bytes: int = 0
    registrar: Registrar | None = None


@dataclass(frozen=True)
class DecodeWay:
    """Whole frames or a tile; `spill` keeps surplus clips in host memory."""

    tile: Tile = WHOLE
    spill: bool = False

    def __str__(self) -> str:
        return f"{self.tile}, with clips in host memory" if self.spill else str(self.tile)


def decode_ways(vae: HunyuanVAE, latents: Tensor, budget: DecodeBudget | None, tile: int = 0) -> list[DecodeWay]:
    """How these latents may be decoded, the most exact first; no budget leaves room for anything.

    Whole frames are exact, wherever their clips lie. Tiles are not, as norms see the tile alone: larger ones and ones
    over the whole time are closer. `tile` pixels come first where given.
    """
    stride = vae.config.spatial_stride
    frames, height, width = latents.shape[2], *(stride * side for side in latents.shape[3:])
    side = max(height, width)

    def footprint(tile: int) -> DecodeFootprint:
        sides = (min(tile or side, height), min(tile or side, width))
        return decode_footprint(vae.config, frames, *sides, vae.dtype.itemsize)

    if 0 < tile < side:
        return [DecodeWay(Tile(tile)), *(DecodeWay(smaller) for smaller in retry_tiles(vae.config, tile))]
    if budget is None:
        return [DecodeWay()]
    free, whole = budget.device_bytes - HEADROOM_BYTES, footprint(0)
    ways = []
    if whole.total_bytes <= free:
        ways.append(DecodeWay())
    if whole.scratch_bytes <= free and whole.clip_bytes <= budget.host_bytes:
        ways.append(DecodeWay(spill=True))
    fitting = fitting_tile(side, lambda tile: footprint(tile).total_bytes, free)
    if fitting:
        ways.append(DecodeWay(Tile(fitting)))
    failing = 0 if fitting is None else fitting or side
    return [*ways, *(DecodeWay(smaller) for smaller in retry_tiles(vae.config, failing))]


def decode_section(
    vae: HunyuanVAE,
    latents: Tensor,
    budget: DecodeBudget | None = None,
    on_chunk: OnChunk | None = None,
    tile: int = 0,
) -> Tensor:
    """Frames `[T, H, W, 3]`, uint8 on the CPU, of `latents [1, 16, t, h, w]`, in the most exact way that fits.

    `tile` pixels instead, where given. `on_chunk` is called before every frame too. BadFrames where they are no
    numbers.
    """

    def decode(way: DecodeWay) -> Tensor:
        logger.info("decoding %s", way)
        return to_uint8(_decode(vae, latents, way, budget, on_chunk))

    return first_fitting(decode_ways(vae, latents, budget, tile), decode, "decoding")


def encode_clip(
    vae: HunyuanVAE,
    video: Tensor,
    budget: DecodeBudget | None = None,
    on_chunk: OnChunk | None = None,
    tile: int = 0,
) -> Tensor:
    """The latent `[1, 16, t, h, w]`, float32 on the CPU, of `video [1, 3, T, H, W]`, in the most exact way that fits.

    The ways are those of decoding, which takes more. `tile` and `on_chunk` as in `decode_section`.
    """
    stride, frames = vae.config.spatial_stride, (video.shape[2] - 1) // vae.config.temporal_stride + 1
    size = frames, video.shape[3] // stride, video.shape[4] // stride
    latents = torch.empty(1, vae.config.latent_channels, *size, device="meta")

    def encode(way: DecodeWay) -> Tensor:
        logger.info("encoding %s", way)
        if way.tile.pixels:
            return encode_tiled(vae, video, way.tile, on_chunk)
        with _store(way, budget, on_chunk) as store:
            return vae.encode(video, store).float().cpu()

    return first_fitting(decode_ways(vae, latents, budget, tile), encode, "encoding")


def _decode(
    vae: HunyuanVAE, latents: Tensor, way: DecodeWay, budget: DecodeBudget | None, on_chunk: OnChunk | None
) -> Tensor:
    if way.tile.pixels:
        return decode_tiled(vae, latents, way.tile, on_chunk)
    with _store(way, budget, on_chunk) as store:
        video = vae.decode(latents, store)
        return watched(vae, video.cpu() if way.spill else video)


@contextmanager
def _store(way: DecodeWay, budget: DecodeBudget | None, on_chunk: OnChunk | None) -> Iterator[FrameStore]:
    """Where clips lie in this way, which `on_chunk` may stop before every frame."""
    check = None if on_chunk is None else partial(on_chunk, 0, 1)
    if not way.spill or budget is None:
        yield FrameStore(check=check)
        return
    with pinned_memory(budget.registrar, budget.host_bytes) as allocate:
        yield FrameStore(0, allocate, check)
