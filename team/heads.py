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

HIDING_GROUPS = 4  # hide most of an exchange behind attention
LEAST_HEADS = 4  # of a card in a group: fewer make attention slower

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, L, H, D] each
AttendMany = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]  # results of the shape of q


def num_hiding(num_heads: int, num_cards: int, most: int = HIDING_GROUPS) -> int:
    """Groups of heads that hide the exchange, at most so many."""
    return max(1, min(most, num_heads // num_cards // LEAST_HEADS))


@dataclass(frozen=True)
class Gathered:
    """One group's heads of this card, over all tokens: q, k, v as `[B, N, 3, heads, D]`, and what of it is on its way.

    A token's three lie side by side, so that another card's come in one copy.
    """

    qkv: Tensor
    arrivals: list[Arrival]


@dataclass(frozen=True)
class GivenBack:
    """What attention made of one group of another card's heads, for this card's tokens: `[B, n, heads, D]` each."""

    heads: slice
    attended: Sequence[Tensor]
    arrival: Arrival


class HeadExchange:
    """One attention: `tokens` are those that each of the `ranks` has of a sample, `index` is this card's place there.

    `qkv` are q, k and v `[B, n, H, D]` of this card's tokens. What attention makes of them replaces q, and comes to
    `more_outs` of its shape where it makes several results. Heads go in `num_groups` groups.
    """

    def __init__(
        self,
        exchange: Exchange,
        ranks: Sequence[int],
        tokens: Sequence[slice],
        qkv: tuple[Tensor, Tensor, Tensor],
        num_groups: int,
        more_outs: Sequence[Tensor] = (),
    ) -> None:
        self.exchange, self.ranks, self.tokens, self.qkv = exchange, ranks, tokens, qkv
        self.outs = [qkv[0], *more_outs]
        self.index = ranks.index(exchange.rank)
        self.others = [index for index in range(len(ranks)) if index != self.index]
        self.groups = head_spans(qkv[0].shape[2], len(ranks), num_groups)
        self._samples = list(zip(*(tensor.unbind(0) for tensor in qkv), strict=True))  # q, k, v [n, H, D] of each

    def run(self, attend: AttendMany) -> None:
        """Fill `outs` by what `attend` makes of queries, keys and values of all cards' tokens."""
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

    def _gather(self, group: int) -> Gathered:
        """Send the others their heads of this card's tokens; have this card's heads of theirs come."""
        heads, q = self.groups[group], self.qkv[0]
        for other in self.others:
            if length(heads[other]):
                self.exchange.send(self.ranks[other], "qkv", [packed(each, heads[other]) for each in self._samples])
        mine, arrivals = heads[self.index], []
        qkv = q.new_empty(q.shape[0], self.tokens[-1].stop, 3, length(mine), q.shape[3])
        if length(mine):
            for each, whole in zip(self._samples, qkv[:, self.tokens[self.index]], strict=True):
                packed(each, mine, whole)
            for other in self.others:
                outs = [*qkv[:, self.tokens[other]]]
                arrivals.append(self.exchange.receive(self.ranks[other], "qkv", outs))
        return Gathered(qkv, arrivals)

    def _attend(self, group: int, gathered: Gathered, attend: AttendMany) -> list[GivenBack]:
        """Compute this card's heads; send the others their tokens of it, and have theirs come."""
        heads, q = self.groups[group], self.qkv[0]
        for arrival in gathered.arrivals:
            self.exchange.wait(arrival)
        if length(heads[self.index]):
            made = attend(*gathered.qkv.unbind(2))
            for other in self.others:
                theirs = [each.contiguous() for attended in made for each in attended[:, self.tokens[other]]]
                self.exchange.send(self.ranks[other], "attended", theirs)
            for out, attended in zip(self.outs, made, strict=True):
                out[:, :, heads[self.index]].copy_(attended[:, self.tokens[self.index]])
        given = []
        for other in self.others:
            if length(heads[other]):
                outs = [q.new_empty(*q.shape[:2], length(heads[other]), q.shape[3]) for _ in self.outs]
                rows = [each for out in outs for each in out]
                arrival = self.exchange.receive(self.ranks[other], "attended", rows)
                given.append(GivenBack(heads[other], outs, arrival))
        return given

    def _keep(self, given: Sequence[GivenBack]) -> None:
        """Put what came back in its place."""
        for each in given:
            self.exchange.wait(each.arrival)
            for out, attended in zip(self.outs, each.attended, strict=True):
                out[:, :, each.heads].copy_(attended)


def packed(tensors: Sequence[Tensor], heads: slice, out: Tensor | None = None) -> Tensor:
    """Some heads of each tensor `[n, H, D]` side by side: `[n, tensors, heads, D]`, by one kernel."""
    return torch.stack([tensor[:, heads] for tensor in tensors], 1, out=out)
