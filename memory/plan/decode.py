"""How a video is decoded in the memory that there is: whole frames, strips of rows, or tiles where neither fits."""

from __future__ import annotations

from dataclasses import dataclass

from .footprint import Limits, WorkSize
from .slack import slack_bytes
from .tiles import TILES, fitting_tile, strip_rows
from .vae_footprint import VaeFootprint

RECORDED_SHARE = 1.5  # of the working memory: what recorded steps work in is fitted together less well
PAGES_AT_WORK = 3  # of what strips leave to each other, on the device: one arrives, one is used, one leaves


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes of VRAM while decoding; no bytes: the plan has no VAE.

    In strips of `rows` rows of pixels or, where that is 0, in tiles of a side in pixels, 0 for whole frames. `in_ram`:
    what waits between strips takes `host` bytes of RAM instead of VRAM.
    """

    tile: int
    total: int
    rows: int = 0
    in_ram: bool = False
    host: int = 0


def choose_decode(
    vae: VaeFootprint | None, work: WorkSize, latent_channels: int, limits: Limits
) -> DecodeMemory | None:
    """The most exact and then fastest way that fits: whole frames, the fewest strips, the largest tiles; or None."""
    if vae is None:
        return DecodeMemory(0, 0)
    free = limits.vram_budget_bytes

    def needed(tile: int) -> int:
        return decode_memory(vae, work, latent_channels, tile, limits.context_bytes)

    if needed(0) <= free:
        return DecodeMemory(0, needed(0))
    if vae.has_strips:
        for rows in strip_rows(work.height):
            for in_ram in (False, True):
                strips = strip_memory(vae, work, latent_channels, (rows, in_ram), limits.context_bytes)
                if strips.total <= free and _ram_suffices(strips.host, limits):
                    return strips
    tile = fitting_tile(max(work.height, work.width), needed, free)
    return None if tile is None else DecodeMemory(tile, needed(tile))


def least_decode_bytes(vae: VaeFootprint | None, work: WorkSize, latent_channels: int, limits: Limits) -> int:
    """VRAM of the leanest way."""
    if vae is None:
        return 0
    tiles = decode_memory(vae, work, latent_channels, TILES[-1], limits.context_bytes)
    if not vae.has_strips:
        return tiles
    rows = strip_rows(work.height)[-1]
    thinnest = [strip_memory(vae, work, latent_channels, (rows, way), limits.context_bytes) for way in (False, True)]
    return min(tiles, *(each.total for each in thinnest if _ram_suffices(each.host, limits)))


def decode_memory(vae: VaeFootprint, work: WorkSize, latent_channels: int, tile: int, context_bytes: int) -> int:
    """Predicted VRAM of decoding in `tile` x `tile` pixels (0: whole frames); finished frames leave the device."""
    height, width = (min(size, tile or size) for size in (work.height, work.width))
    moving = height * width * (vae.cache_bytes_per_pixel + vae.working_bytes_per_pixel)
    moving += 2 * 4 * work.batch * work.latent_positions * latent_channels
    return context_bytes + vae.weight_bytes + moving + slack_bytes(moving)


def strip_memory(
    vae: VaeFootprint, work: WorkSize, latent_channels: int, way: tuple[int, bool], context_bytes: int
) -> DecodeMemory:
    """Predicted VRAM, and RAM, of decoding in strips: a way is their rows, and whether what waits lies in RAM."""
    rows, in_ram = way
    frames, height, width = work.latent_size
    page = work.width * vae.seam_bytes_per_column
    waiting = frames * (page + height * width * vae.waiting_bytes_per_position)
    working = int(RECORDED_SHARE * vae.working_bytes_per_pixel)
    moving = rows * work.width * (vae.cache_bytes_per_pixel - vae.whole_bytes_per_pixel + working)
    moving += work.width * vae.strip_bytes_per_column
    moving += 2 * 4 * work.latent_positions * latent_channels
    moving += PAGES_AT_WORK * page if in_ram else waiting
    total = context_bytes + vae.weight_bytes + moving + slack_bytes(moving)
    return DecodeMemory(0, total, rows, in_ram, waiting if in_ram else 0)


def _ram_suffices(host_bytes: int, limits: Limits) -> bool:
    return limits.ram_budget_bytes is None or host_bytes <= limits.ram_budget_bytes
