"""Attention over all cards' tokens: every card has some heads of all tokens for it, and gives the result back.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509), by groups of heads: while one group computes, the next one's
queries, keys and values are on their way, and the last one's result. Cards may have unequal numbers of heads and of
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .exchange import Arrival, Exchange
from .spans import head_spans, length

# So many groups hide most of the exchange behind attention; smaller ones than these heads make attention slower.
HIDING_GROUPS, LEAST_HEADS = 4, 4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, L, H, D] each


@dataclass(frozen=True)
class Gathered:
    """One group's heads of this card, over all tokens: `qkv [3, B, N, heads, D]`, and what of it is on its way."""

    qkv: Tensor
    arrivals: list[Arrival]


@dataclass(frozen=True)
class GivenBack:
    """What attention made of one group of another card's heads, for this card's tokens: `[B, n, heads, D]`."""

    heads: slice
    attended: Tensor
    arrival: Arrival


class HeadExchange:
    """One attention: `tokens` are those that each of the `ranks` has of a sample, `index` is this card's place there.

    `qkv` are q, k and v `[B, n, H, D]` of this card's tokens; attention replaces q. Heads go in `num_groups` groups, or
    in more where that hides what is exchanged.
    """

    def __init__(
        self,
        exchange: Exchange,
        ranks: Sequence[int],
        tokens: Sequence[slice],
        qkv: tuple[Tensor, Tensor, Tensor],
        num_groups: int,
    ) -> None:
        self.exchange, self.ranks, self.tokens, self.qkv = exchange, ranks, tokens, qkv
        self.index = ranks.index(exchange.rank)
        self.others = [index for index in range(len(ranks)) if index != self.index]
        num_heads = qkv[0].shape[2]
        hiding = min(HIDING_GROUPS, num_heads // len(ranks) // LEAST_HEADS)
        self.groups = head_spans(num_heads, len(ranks), max(num_groups, hiding))

    def run(self, attend: Attend) -> None:
        """Replace q by its attention to all cards' keys and values, by `attend`."""
        ahead = self._gather(0)
        before: list[GivenBack] = []
        for group in range(len(self.groups)):
            gathered = ahead
            if group + 1 < len(self.groups):
                ahead = self._gather(group + 1)
            given = self._attend(group, gathered, attend)
            self._keep(before)
            before = given
        self._keep(before)
        self.exchange.settle()

    def _gather(self, group: int) -> Gathered:
        """Send the others their heads of this card's tokens; have this card's heads of theirs come."""
        heads, q = self.groups[group], self.qkv[0]
        for other in self.others:
            if length(heads[other]):
                packed = torch.stack([tensor[:, :, heads[other]] for tensor in self.qkv])
                self.exchange.send(self.ranks[other], "qkv", [*packed.flatten(0, 1)])
        mine, arrivals = heads[self.index], []
        qkv = q.new_empty(3, q.shape[0], self.tokens[-1].stop, length(mine), q.shape[3])
        if length(mine):
            for tensor, whole in zip(self.qkv, qkv, strict=True):
                whole[:, self.tokens[self.index]].copy_(tensor[:, :, mine])
            for other in self.others:
                outs = [*(row for each in qkv for row in each[:, self.tokens[other]])]
                arrivals.append(self.exchange.receive(self.ranks[other], "qkv", outs))
        return Gathered(qkv, arrivals)

    def _attend(self, group: int, gathered: Gathered, attend: Attend) -> list[GivenBack]:
        """Compute this card's heads; send the others their tokens of it, and have theirs come."""
        heads, q = self.groups[group], self.qkv[0]
        for arrival in gathered.arrivals:
            self.exchange.wait(arrival)
        if length(heads[self.index]):
            attended = attend(*gathered.qkv)
            for other in self.others:
                packed = attended[:, self.tokens[other]].clone(memory_format=torch.contiguous_format)
                self.exchange.send(self.ranks[other], "attended", [packed])
            q[:, :, heads[self.index]].copy_(attended[:, self.tokens[self.index]])
        given = []
        for other in self.others:
            if length(heads[other]):
                out = q.new_empty(q.shape[0], q.shape[1], length(heads[other]), q.shape[3])
                arrival = self.exchange.receive(self.ranks[other], "attended", [out])
                given.append(GivenBack(heads[other], out, arrival))
        return given

    def _keep(self, given: Sequence[GivenBack]) -> None:
        """Put what came back in q's place."""
        for each in given:
            self.exchange.wait(each.arrival)
            self.qkv[0][:, :, each.heads].copy_(each.attended)
