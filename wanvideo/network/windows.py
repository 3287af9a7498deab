"""Self-attention of a video that comes in windows of two latent frames: causal, and sparse by blocks.

Source: FlashVSR (Zhuang et al. 2025, arXiv:2510.12747), OpenImagingLab/FlashVSR `diffsynth/models/wan_video_dit.py`.
Tokens are taken in blocks of 2 x 8 x 8. A block of queries attends blocks of its own window and of those before which
are near it in space, and of these the ones that its mean scores highest for; what is kept of earlier windows are their
keys and values in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from ...attention.backend import Backend
from ...attention.masked import MASK_BLOCK, GatheredBlocks, MaskedAttention
from ...attention.sparse.order import reorder_
from ...system.torch_compiler import outside_graphs
from ...transformer.workspace import Workspace

WINDOW = 2  # latent frames
SIDE = 8  # tokens of a block, in height and in width
# The published share of blocks is of a frame of this many pixels: larger ones keep as many in all.
PUBLISHED_PIXELS = 768 * 1280
TOKEN_PIXELS = 16  # the side of a token in pixels
ROWS = 8192  # tokens that are added at a time
HEADS = 4  # whose blocks are chosen at a time


@dataclass(frozen=True)
class WindowSettings:
    """How much self-attention sees.

    `sparse_ratio` is how many blocks of keys are attended, as a multiple of a window's blocks in a frame of 768 x 1280;
    0: all, dense. `local_range` is the side, in blocks, of the square around a block that it may attend.
    """

    sparse_ratio: float = 2.0
    local_range: int = 11

    def num_kept(self, blocks: int) -> int:
        """Pairs of blocks that a head attends, of a window that has so many."""
        pixels = blocks * MASK_BLOCK * TOKEN_PIXELS**2 // WINDOW
        ratio = self.sparse_ratio * PUBLISHED_PIXELS / pixels
        return int(blocks**2 * ratio) - 1


class WindowMemory(Protocol):
    """Keys and values of earlier windows, layer by layer; `[rows, dim]` each, oldest first."""

    def open(self, layer: int, num_new: int) -> tuple[Tensor, Tensor]:
        """Those of a layer with room behind them for `num_new` rows, which whoever asks fills in."""
        ...

    def close(self, layer: int) -> None:
        """The new rows are there: they are kept from here on, though a pass that is begun again finds the old ones."""
        ...


@dataclass(frozen=True)
class WindowPass:
    """One pass over some windows: what it is added to, and what it remembers.

    `first_frame` is the place of its first latent frame in the video. `additions` are tokens `[rows, dim]` that are
    added before the first layers, one each, in the order of the grid.
    """

    memory: WindowMemory
    settings: WindowSettings = field(default_factory=WindowSettings)
    masked: MaskedAttention = field(default_factory=GatheredBlocks)
    additions: tuple[Tensor, ...] = ()
    first_frame: int = 0


class WindowAttention:
    """Self-attention of one such pass, whose layers say that they begin."""

    reorders = True

    def __init__(self, state: WindowPass, grid: tuple[int, int, int], work: Workspace) -> None:
        self.state, self.num_heads = state, work.rows.num_heads
        self._dense: Backend = work.execution.attention
        self._residual_scale = work.residual_scale
        frames, height, width = grid
        if frames % WINDOW or height % SIDE or width % SIDE:
            raise ValueError(f"a grid of {grid} tokens has no whole blocks of {WINDOW} x {SIDE} x {SIDE}")
        self.num_windows = frames // WINDOW
        self._grid = grid
        self._index: Tensor | None = None
        self._near: Tensor | None = None
        self._layer, self._heads_done = 0, 0
        self._kept: tuple[Tensor, Tensor] | None = None  # of the layer
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = outside_graphs(self.attend_now)

    def begin_layer(self, layer: int, tokens: Sequence[Tensor], spare: Tensor) -> None:
        """The next layer has its turn; before the first, all `tokens [rows, ...]` come in the order of blocks."""
        if self._index is None:
            index = block_order(self._grid, spare.device)
            for each in tokens:
                reorder_(each, index, spare)
            self._index = index
        if layer < len(self.state.additions):
            added = self.state.additions[layer]
            for x, places in zip(tokens[0].split(ROWS), self._index.split(ROWS), strict=True):
                x.add_(added[places], alpha=self._residual_scale)
        self._layer, self._heads_done = layer, 0

    def end(self, tokens: Tensor, spare: Tensor) -> None:
        """All layers are done: the tokens come back to their places."""
        if self._index is not None:
            inverse = torch.empty_like(self._index)
            inverse[self._index] = torch.arange(len(inverse), device=inverse.device)
            reorder_(tokens, inverse, spare)

    def attend_now(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Backend.attend`, of some heads of the layer: of all windows that are remembered, too."""
        memory, rows, heads = self.state.memory, q.shape[1], q.shape[2]
        if self._kept is None:
            self._kept = memory.open(self._layer, rows)
        part = slice(self._heads_done, self._heads_done + heads)
        keys, values = (rearrange(each, "n (h d) -> 1 n h d", h=self.num_heads)[:, :, part] for each in self._kept)
        keys[:, -rows:].copy_(k)
        values[:, -rows:].copy_(v)
        if self.state.settings.sparse_ratio:
            out = self.state.masked.attend(q, keys, values, self._mask(q, keys))
        else:
            out = self._dense.attend(q, keys, values)
        self._heads_done += heads
        if self._heads_done == self.num_heads:
            memory.close(self._layer)
            self._kept = None
        return out

    def _mask(self, q: Tensor, keys: Tensor) -> Tensor:
        if self._near is None:
            self._near = near_blocks(self._grid, self.state.settings.local_range, q.device)
        blocks = (each[0].unflatten(0, (-1, MASK_BLOCK)) for each in (q, keys))
        means = [each.mean(1, dtype=torch.float32) for each in blocks]  # [blocks, H, D]
        heads = zip(*(each.split(HEADS, 1) for each in means), strict=True)
        settings, near = self.state.settings, self._near
        return torch.cat([choose_blocks(some, those, near, self.num_windows, settings) for some, those in heads])


def block_order(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """The places `[t h w]` of a grid's tokens as they follow each other block by block."""
    places = torch.arange(math.prod(grid), device=device).view(grid)
    pattern = "(nt t) (nh h) (nw w) -> (nt nh nw t h w)"
    return rearrange(places, pattern, t=WINDOW, h=SIDE, w=SIDE)


def near_blocks(grid: tuple[int, int, int], local_range: int, device: torch.device) -> Tensor:
    """`[blocks, blocks]` of one window: which are at most half of `local_range` from each other, each way."""

    def along(size: int) -> Tensor:
        place = torch.arange(size, device=device)
        away = place[None] - place[:, None] + local_range // 2
        return (away >= 0) & (away < local_range)

    down, across = along(grid[1] // SIDE), along(grid[2] // SIDE)
    return rearrange(down[:, None, :, None] & across[None, :, None, :], "a b c d -> (a b) (c d)")


def choose_blocks(queries: Tensor, keys: Tensor, near: Tensor, num_windows: int, settings: WindowSettings) -> Tensor:
    """Which blocks of keys `[H, nq, nk]` each block of queries attends, by the means `[blocks, H, D]` of both.

    Every window of queries has as many pairs: those with the largest shares of its rows' softmax over what is near.
    """
    blocks = near.shape[0]
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
    far = ~near.repeat(num_windows, keys.shape[0] // blocks)
    shares = scores.masked_fill_(far, float("-inf")).softmax(-1)
    shares = rearrange(shares, "h (n q) k -> (h n) (q k)", n=num_windows)
    count = min(shares.shape[1] - 1, max(0, settings.num_kept(blocks)))
    least = shares.topk(count + 1, dim=1, sorted=False).values.amin(1, keepdim=True)
    return rearrange(shares > least, "(h n) (q k) -> h (n q) k", n=num_windows, q=blocks)
