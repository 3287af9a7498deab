"""The order of tokens in which 64 in a row are neighbours in space and time.

A grid of tokens is cut into rods of about 4 frames x 4 rows, which run along its width one after the other, to and
fro: any 64 tokens in a row are about a cube, at every size of the grid, and no token is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import BLOCK, BlockChoice

FRAMES_TOGETHER = 4


@dataclass(frozen=True)
class TokenOrder:
    """`index [tokens]` is where each token of the order was, `inverse` where each is now.

    `sinks` and `exact_queries` are blocks `[start, end)`: see `BlockChoice`.
    """

    index: Tensor
    inverse: Tensor
    sinks: tuple[int, int] = (0, 0)
    exact_queries: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, index: Tensor, sinks: tuple[int, int] = (0, 0), exact_queries: tuple[int, int] = (0, 0)) -> TokenOrder:
        """The order whose tokens come from the places `index`; ranges of its tokens that are sinks, and so on."""
        inverse = torch.empty_like(index)
        inverse[index] = torch.arange(len(index), device=index.device)
        return cls(index, inverse, _blocks(sinks), _blocks(exact_queries))

    def choice(self, tau: float, top_k: float, tokens: int) -> BlockChoice:
        """The blocks that are attended exactly, of the first so many tokens."""
        count = -(-tokens // BLOCK)
        sinks, exact = ((min(start, count), min(end, count)) for start, end in (self.sinks, self.exact_queries))
        return BlockChoice(tau, top_k, sinks, exact)

    def to(self, device: torch.device) -> TokenOrder:
        """The same on a device."""
        return TokenOrder(self.index.to(device), self.inverse.to(device), self.sinks, self.exact_queries)


def compact_order(grid: tuple[int, int, int], frames_apart: bool = False) -> Tensor:
    """The places `[t * h * w]` of a grid's tokens, as they follow each other in rods.

    `frames_apart`: each frame's tokens stay together, where something differs from frame to frame.
    """
    frames, height, width = grid
    depth = 1 if frames_apart or frames < FRAMES_TOGETHER else FRAMES_TOGETHER
    slab = _pieces(frames, depth)  # [t], which slab a frame is in
    rod = _pieces(height, round(math.sqrt(BLOCK / depth)))  # [h]
    num_rods = int(rod[-1]) + 1
    slab, rod = slab[:, None, None], rod[None, :, None]
    place = slab * num_rods + torch.where(slab % 2 == 0, rod, num_rods - 1 - rod)  # rods to and fro
    across = torch.arange(width)[None, None]
    along = torch.where(place % 2 == 0, across, width - 1 - across)  # and tokens in them
    time, down = torch.arange(frames)[:, None, None], torch.arange(height)[None, :, None]
    key = ((place * width + along) * frames + time) * height + down
    return key.flatten().argsort()


def video_order(grid: tuple[int, int, int], num_sink_frames: int = 0, frames_apart: bool = False) -> TokenOrder:
    """The order of a video's tokens, of which the first frames are sinks and stay where they are."""
    frame = grid[1] * grid[2]
    first = num_sink_frames * frame
    rest = compact_order((grid[0] - num_sink_frames, *grid[1:]), frames_apart) + first
    return TokenOrder.of(torch.cat([torch.arange(first), rest]), sinks=(0, first))


def shown_order(parts: Sequence[int], noisy: tuple[int, int, int], num_text: int) -> TokenOrder:
    """Of rows that are `parts` of history, then a `noisy` grid, then text: the grid first, all others sinks at the end.

    The text's queries attend everything exactly.
    """
    before, own = sum(parts), math.prod(noisy)
    index = torch.cat(
        [compact_order(noisy) + before, torch.arange(before), torch.arange(before + own, before + own + num_text)]
    )
    tokens = before + own + num_text
    return TokenOrder.of(index, sinks=(own, tokens), exact_queries=(before + own, tokens))


def reorder_(rows: Tensor, index: Tensor, spare: Tensor | None = None) -> None:
    """Order rows `[B * tokens, ...]` in place, each sample's by `index [tokens]`.

    They go through the bytes of `spare`, which nobody else may need, where those suffice.
    """
    nbytes = rows.numel() * rows.dtype.itemsize
    if spare is None or spare.numel() * spare.dtype.itemsize < nbytes:
        before = rows.clone()
    else:
        before = spare.flatten().view(torch.uint8)[:nbytes].view(rows.dtype).view(rows.shape).copy_(rows)
    tokens = len(index)
    for sample in range(0, len(rows), tokens):
        part = slice(sample, sample + tokens)
        torch.index_select(before[part], 0, index, out=rows[part])


def _pieces(length: int, size: int) -> Tensor:
    """`[length]`: which piece each place is in, where as many as are about `size` long share it evenly."""
    count = max(1, round(length / size))
    return torch.arange(length) * count // length


def _blocks(tokens: tuple[int, int]) -> tuple[int, int]:
    """The blocks that have any of a range of tokens."""
    start, end = tokens
    return (start // BLOCK, -(-end // BLOCK)) if end > start else (0, 0)
