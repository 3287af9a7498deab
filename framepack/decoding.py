"""Decoding a section's latents in the memory that there is: whole, with its clips in host memory, or in tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .vae import HunyuanVAE, decode_footprint
from .vae_frames import SpillStore
from .vae_tiles import OVERLAP, TILE, decode_tiled

logger = logging.getLogger(__name__)

SMALLEST_TILE = 128
HEADROOM_BYTES = 256 << 20  # cuDNN's workspaces, and what the allocator cannot fit together again
OnChunk = Callable[[int, int], None]


def decode_section(vae: HunyuanVAE, latents: Tensor, free_bytes: int | None, on_chunk: OnChunk | None = None) -> Tensor:
    """Frames `[T, H, W, 3]` in -1 ... 1 on the CPU of `latents [1, 16, t, h, w]`.

    `free_bytes` of the VAE's device may be used (None: any number). Whole clips are exact; where they fit only with
    their frames in host memory they are as exact and slower; tiles, the last resort, are close.
    """
    frames, height, width = latents.shape[2], *(vae.config.spatial_stride * side for side in latents.shape[3:])
    footprint = decode_footprint(vae.config, frames, height, width, vae.dtype.itemsize)
    room = None if free_bytes is None else free_bytes - HEADROOM_BYTES - footprint.scratch_bytes
    tile = 0
    while True:
        try:
            if tile or (room is not None and room < 0):
                tile = tile or TILE
                video = decode_tiled(vae, latents, tile, min(OVERLAP, tile // 2), on_chunk=on_chunk)
            else:
                spills = room is not None and room < footprint.clip_bytes
                video = vae.decode(latents.to(vae.device), SpillStore(room) if spills and room is not None else None)
            return video[0].permute(1, 2, 3, 0).float().cpu()
        except torch.cuda.OutOfMemoryError:
            if tile == SMALLEST_TILE:
                raise
            tile = SMALLEST_TILE if tile else TILE
        logger.warning("out of VRAM while decoding: tiles of %d pixels are tried", tile)
        torch.cuda.empty_cache()
