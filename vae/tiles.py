"""Rectangles cut into overlapping tiles whose blending weights sum to one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import EllipsisType

import torch
from torch import Tensor


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
