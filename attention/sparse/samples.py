"""The dense answer for a few queries: how far attention is from it, and how much of it was computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import BLOCK, BlockChoice

ROWS = 32  # queries, each of another stretch of the tokens
HEADS_APART = 7  # one head in so many; one in five cost more than 2 % of a sparse step of 32,760 tokens
PARTS = 16  # of the keys, whose weighted values are summed side by side

LOG2E = 1.4426950408889634


class Samples:
    """Which queries and heads of a pass are looked at; drawn anew for each call, the same for the same `seed`."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device, self._calls = device, seed

    def rows(self, tokens: int) -> Tensor:
        """`[ROWS]` places among so many tokens, one in each stretch; nothing is read from the device."""
        count = min(ROWS, tokens)
        stretch = torch.arange(count, device=self._device) + torch.rand(
            count, generator=self._generator, device=self._device
        )
        return (stretch * (tokens / count)).long().clamp_(max=tokens - 1)

    def heads(self, num_heads: int) -> slice:
        """One head in `HEADS_APART`, beginning with another one in every call."""
        self._calls += 1
        return slice(self._calls % min(HEADS_APART, num_heads), num_heads, HEADS_APART)


class LayerSamples:
    """The samples of one layer after the other, of `all_heads`: the same whatever calls, on however many cards, it has.

    What is drawn for a layer is drawn by its first call.
    """

    def __init__(self, samples: Samples, all_heads: int) -> None:
        self._samples, self._all_heads = samples, all_heads
        self.begin_layer(0)

    def begin_layer(self, first_head: int) -> None:
        """The calls that follow have heads of the next layer, from this one on."""
        self._next_head = first_head
        self._first: int | None = None
        self._rows: dict[int, Tensor] = {}

    def rows(self, tokens: int) -> Tensor:
        """As those of `Samples`."""
        if tokens not in self._rows:
            self._rows[tokens] = self._samples.rows(tokens)
        return self._rows[tokens]

    def heads(self, num_heads: int) -> slice:
        """Of a call's heads, which follow those of the call before; there may be none."""
        if self._first is None:
            self._first = self._samples.heads(self._all_heads).start
        first, self._next_head = self._next_head, self._next_head + num_heads
        return slice((self._first - first) % HEADS_APART, num_heads, HEADS_APART)


def compare(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, samples: Samples | LayerSamples, blocks: BlockChoice | None = None
) -> Tensor:
    """`[3]`: the squared difference of `out` to the dense answer over the sampled rows, the square of that, density.

    All are `[L, H, D]` of one sample, `out` and `q` of the same rows. `blocks` are those that were chosen (None: all).
    Density is the share of keys' blocks that the sampled queries attended exactly. fp32; zeros where no head
    is sampled.
    """
    heads, rows = samples.heads(q.shape[1]), samples.rows(q.shape[0])
    if heads.start >= q.shape[1]:
        return torch.zeros(3, device=q.device)
    keys, values = _padded(k[:, heads]), _padded(v[:, heads])  # [h, P, L, D]
    dense = _attend(q[:, heads].index_select(0, rows).float().transpose(0, 1), keys, values, k.shape[0])
    given = out[:, heads].index_select(0, rows).float().transpose(0, 1)
    sums = [(given - dense).square().sum(), dense.square().sum()]
    if blocks is None:
        sums.append(torch.ones_like(sums[0]))
    else:
        sums.append(_density(q[:, heads], keys, rows // BLOCK, k.shape[0], blocks))
    return torch.stack(sums)


def _padded(x: Tensor) -> Tensor:
    """`[L, h, D]` as `[h, parts, length, D]` in fp32, zeros at the end; parts hold whole blocks."""
    tokens, heads, dim = x.shape
    length = -(-tokens // (PARTS * BLOCK)) * BLOCK
    out = torch.empty(heads, PARTS * length, dim, device=x.device, dtype=torch.float32)
    out[:, :tokens] = x.transpose(0, 1)
    out[:, tokens:] = 0
    return out.view(heads, PARTS, length, dim)


def _attend(q: Tensor, keys: Tensor, values: Tensor, tokens: int) -> Tensor:
    """Attention of `q [h, R, D]`; to the first so many of the keys.

    What there is of every key is written and read as few times as can be: at 32,760 tokens that is its time.
    """
    scores = (q / math.sqrt(q.shape[-1]))[:, None] @ keys.transpose(2, 3)  # [h, P, R, L]
    part, place = divmod(tokens, keys.shape[2])  # of the first key that is none
    if part < PARTS:
        scores[:, part, :, place:] = -torch.inf
        scores[:, part + 1 :] = -torch.inf
    weights = scores.sub_(scores.amax((1, 3), keepdim=True)).exp_()
    return (weights @ values).sum(1) / weights.sum((1, 3))[..., None]


def _density(q: Tensor, keys: Tensor, queries: Tensor, tokens: int, blocks: BlockChoice) -> Tensor:
    """The share of blocks that the blocks `queries [R]` of `q [L, h, D]` attend exactly, as the choice is defined."""
    count, last = -(-tokens // BLOCK), (tokens - 1) % BLOCK + 1  # and how many tokens the last one has
    means = keys.flatten(1, 2).unflatten(1, (-1, BLOCK))[:, :count].sum(2) / BLOCK  # [h, N, D]
    if last < BLOCK:
        means[:, -1] *= BLOCK / last
    means -= means.mean(1, keepdim=True)
    places = (queries[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).clamp_(max=q.shape[0] - 1)
    centres = q.index_select(0, places.flatten()).float().unflatten(0, places.shape).mean(1).transpose(0, 1)
    centres = centres * (LOG2E / math.sqrt(q.shape[-1]))
    scores = centres @ means.transpose(1, 2)  # [h, R, N]
    index = torch.arange(count, device=q.device)
    exact = (queries[:, None] - index).abs() <= 1  # neighbours
    for place, (start, end) in ((index, blocks.sinks), (queries[:, None], blocks.exact_queries)):
        if end > start:
            exact = exact | ((place >= start) & (place < end))
    if blocks.top_k:
        start, end = blocks.sinks
        free = count - (end - start)
        kept = max(1, min(free - 1, round(blocks.top_k * free)))
        scores[..., start:end] = -torch.inf
        chosen = scores >= scores.topk(min(kept, count), dim=-1).values[..., -1:]
    else:
        spread = (centres.square() * means.square().mean(1, keepdim=True)).sum(-1, keepdim=True)
        chosen = scores > blocks.tau * (spread + 1e-6).sqrt()
    return (chosen | exact).float().mean()
