"""Encoding and decoding in spatial tiles, each over its whole time, with the memory of one tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion.tile_retries import Tile, in_shrinking_tiles
from ..diffusion.tiles import plan_grid
from ..diffusion.vae_checks import check_video
from .vae import WanVAE, check_latent

ENCODE_TILES = tuple(Tile(pixels) for pixels in (512, 384, 256, 128))  # for videos that the device does not hold
ENCODE_OVERLAP = 64  # pixels

OnChunk = Callable[[int, int], None]  # (chunks done, chunks in all); may raise to stop


def decode_tiled(vae: WanVAE, latent: Tensor, tile: int, overlap: int, on_chunk: OnChunk | None = None) -> Tensor:
    """Decode `latent` [B, z, T, h, w] tile by tile to video [B, 3, 4(T-1)+1, H, W] in [-1, 1], on the CPU.

    `tile` and `overlap` are pixels, rounded to whole latent positions: the tile down, the overlap up. Each tile is
    decoded over its whole time with one causal cache, so no seam appears in time; neighbours are blended with linear
    ramps. A tile as large as the video gives exactly what `vae.decode` does. The result is float32 for a float32
    VAE, else float16, whose rounding is far below one step of eight-bit colour.
    Raises ValueError for a latent of another VAE or an impossible tile.
    """
    check_latent(vae.config, latent)
    stride = vae.config.spatial_stride
    grid = plan_grid(latent.shape[3], latent.shape[4], tile, overlap, stride)
    num_latent_frames = latent.shape[2]
    num_frames = (num_latent_frames - 1) * vae.config.temporal_stride + 1
    dtype = torch.float32 if vae.dtype == torch.float32 else torch.float16
    height, width = grid.rows.size * stride, grid.columns.size * stride
    video = torch.zeros(latent.shape[0], 3, num_frames, height, width, dtype=dtype)
    for number, place in enumerate(grid.places()):
        weights = grid.weights(place, stride).to(vae.device)
        target = video[grid.window(place, stride)]
        start = 0
        for index, frames in enumerate(vae.decode(latent[grid.window(place)])):
            end = start + frames.shape[2]
            target[:, :, start:end] += (frames * weights).to("cpu", dtype)
            start = end
            if on_chunk is not None:
                on_chunk(number * num_latent_frames + index + 1, grid.num_tiles * num_latent_frames)
    return video


def encode_fitting(vae: WanVAE, video: Tensor) -> Tensor:
    """`vae.encode(video)` on the VAE's device; in tiles, and then fp32, where that runs out of memory."""

    def tiled(tile: Tile) -> Tensor:
        return encode_tiled(vae, video, tile.pixels, min(ENCODE_OVERLAP, tile.pixels // 2)).to(vae.device)

    what = f"encoding {video.shape[2]} frame{'s' if video.shape[2] > 1 else ''}"
    return in_shrinking_tiles(lambda: vae.encode(video), tiled, ENCODE_TILES, what)


def encode_tiled(vae: WanVAE, video: Tensor, tile: int, overlap: int, on_chunk: OnChunk | None = None) -> Tensor:
    """Encode `video` [B, 3, T, H, W] in [-1, 1] tile by tile to a normalised latent [B, z, (T-1)//4+1, h, w].

    The latent is float32 on the CPU. `tile` and `overlap` are as in `decode_tiled`; a chunk is one whole tile.
    Raises ValueError for a video that does not fit the VAE or an impossible tile.
    """
    check_video(vae.config, video)
    stride = vae.config.spatial_stride
    grid = plan_grid(video.shape[3] // stride, video.shape[4] // stride, tile, overlap, stride)
    num_latent_frames = (video.shape[2] - 1) // vae.config.temporal_stride + 1
    shape = (video.shape[0], vae.config.z_dim, num_latent_frames, grid.rows.size, grid.columns.size)
    latent = torch.zeros(shape)
    for number, place in enumerate(grid.places()):
        encoded = vae.encode(video[grid.window(place, stride)])
        latent[grid.window(place)] += encoded.float().cpu() * grid.weights(place)
        if on_chunk is not None:
            on_chunk(number + 1, grid.num_tiles)
    return latent
