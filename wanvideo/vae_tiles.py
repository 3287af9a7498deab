"""Encoding and decoding in spatial tiles, each over its whole time, with the memory of one tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import EllipsisType

import torch
from torch import Tensor

from .vae import WanVAE, check_latent, check_video

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


# --- index arithmetic ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """One side of `size` latent positions, cut into tiles of `length` positions that begin at `starts`."""

    size: int
    length: int
    starts: tuple[int, ...]

    def window(self, index: int, scale: int = 1) -> slice:
        """Where a tile lies, in steps of 1/`scale` latent positions."""
        return slice(self.starts[index] * scale, (self.starts[index] + self.length) * scale)

    def weights(self, scale: int = 1) -> Tensor:
        """Blending weights [tiles, length * scale]: linear ramps over the overlaps, summing to one everywhere."""
        length = self.length * scale
        position = torch.arange(length, dtype=torch.float64) + 0.5
        ramps = torch.ones(len(self.starts), length, dtype=torch.float64)
        for index in range(1, len(self.starts)):
            overlap = (self.starts[index - 1] + self.length - self.starts[index]) * scale
            if overlap:
                rising = (position / overlap).clamp(max=1.0)
                ramps[index] = ramps[index].minimum(rising)
                ramps[index - 1] = ramps[index - 1].minimum(rising.flip(0))
        # Already one where two tiles meet; evenly spread tiles may overlap the next but one too.
        total = torch.zeros(self.size * scale, dtype=torch.float64)
        for index, ramp in enumerate(ramps):
            total[self.window(index, scale)] += ramp
        for index, ramp in enumerate(ramps):
            ramp /= total[self.window(index, scale)]
        return ramps.float()


@dataclass(frozen=True)
class Grid:
    """Tiles over a rectangle of latent positions; a place is (row, column)."""

    rows: Cut
    columns: Cut

    @property
    def num_tiles(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def places(self) -> list[tuple[int, int]]:
        return list(product(range(len(self.rows.starts)), range(len(self.columns.starts))))

    def window(self, place: tuple[int, int], scale: int = 1) -> tuple[EllipsisType, slice, slice]:
        """What selects one tile from a tensor [..., height * scale, width * scale]."""
        return ..., self.rows.window(place[0], scale), self.columns.window(place[1], scale)

    def weights(self, place: tuple[int, int], scale: int = 1) -> Tensor:
        """Blending weights [height, width] of one tile."""
        return torch.outer(self.rows.weights(scale)[place[0]], self.columns.weights(scale)[place[1]])


def plan_grid(height: int, width: int, tile: int, overlap: int, stride: int) -> Grid:
    """Cut `height` x `width` latent positions into tiles of `tile` pixels that share at least `overlap` pixels.

    `stride` is pixels per position. Raises ValueError, naming both, when the overlap leaves a tile no room to advance.
    """
    length, shared = tile // stride, -(-overlap // stride)
    if overlap < 0 or length < 1 or shared >= length:
        raise ValueError(
            f"a tile of {tile} pixels that overlaps by {overlap} cannot be cut: this VAE has {stride} pixels per "
            f"latent position, so the tile must be at least {max(shared + 1, 1) * stride} and the overlap from 0 to "
            f"less than the tile. Try a tile of 256 and an overlap of 64."
        )
    return Grid(cut(height, length, shared), cut(width, length, shared))


def cut(size: int, length: int, overlap: int) -> Cut:
    """The fewest tiles of `length` that cover `size` and overlap by at least `overlap`, evenly spread."""
    if length >= size:
        return Cut(size, size, (0,))
    num_steps = -(-(size - length) // (length - overlap))
    return Cut(size, length, tuple(step * (size - length) // num_steps for step in range(num_steps + 1)))
