"""Attention over all cards' tokens: every card has some heads of all tokens for it, and gives the result back.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509), by groups of heads: while one group computes, the next one's
queries, keys and values are on their way, and the last one's result. Cards may have unequal numbers of heads and of
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..system.words import copy_in_words
from .carriers import AS_THEY_ARE, Carrier, packed
from .exchange import Arrival, Awaited, Exchange
from .spans import head_spans, length

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, L, H, D] each
AttendMany = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]  # results of the shape of q


@dataclass(frozen=True)
class Coming:
    """Heads of some tokens on their way: what comes to each room is for the tensor beside it, `[n, k, heads, D]`."""

    arrival: Arrival
    rooms: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gathered:
    """One group's heads of this card, over all tokens: q, k, v as `[B, N, 3, heads, D]`, and what of it is on its way.

    A token's three lie side by side, so that another card's come in one copy.
    """

    qkv: Tensor
    coming: list[Coming]


class HeadExchange:
    """One attention: `tokens` are those that each of the `ranks` has of a sample, `index` is this card's place there.

    `qkv` are q, k and v `[B, n, H, D]` of this card's tokens. What attention makes of them replaces q, and comes to
    `more_outs` of its shape where it makes several results. Heads go in groups of these `sizes` (see `head_spans`), by
    the `carrier`.
    """

    def __init__(
        self,
        exchange: Exchange,
        ranks: Sequence[int],
        tokens: Sequence[slice],
        qkv: tuple[Tensor, Tensor, Tensor],
        sizes: Sequence[int],
        more_outs: Sequence[Tensor] = (),
        carrier: Carrier = AS_THEY_ARE,
    ) -> None:
        self.exchange, self.ranks, self.tokens, self.qkv = exchange, ranks, tokens, qkv
        self.carrier = carrier
        self.outs = [qkv[0], *more_outs]
        self.index = ranks.index(exchange.rank)
        self.others = [index for index in range(len(ranks)) if index != self.index]
        self.groups = head_spans(qkv[0].shape[2], len(ranks), tuple(sizes))
        self._samples = list(zip(*(tensor.unbind(0) for tensor in qkv), strict=True))  # q, k, v [n, H, D] of each

    def run(self, attend: AttendMany) -> None:
        """Fill `outs` by what `attend` makes of queries, keys and values of all cards' tokens."""
        for _ in self.steps(attend):  # what is not there is waited for
            pass

    def steps(self, attend: AttendMany) -> Generator[Awaited, None, None]:
        """`run`, which stops where something that it needs was not sent yet, and says what."""
        self.exchange.release_taken()
        ahead = yield from self._gather(0)
        before: list[Coming] = []
        for group in range(len(self.groups)):
            gathered = ahead
            if group + 1 < len(self.groups):
                ahead = yield from self._gather(group + 1)
            given = yield from self._attend(group, gathered, attend)
            self._keep(before)
            before = given
        self._keep(before)

    def _gather(self, group: int) -> Generator[Awaited, None, Gathered]:
        """Send the others their heads of this card's tokens; have this card's heads of theirs come."""
        heads, q = self.groups[group], self.qkv[0]
        for other in self.others:
            if length(heads[other]):
                self._send(other, "qkv", [self.carrier.load(each, heads[other]) for each in self._samples])
        mine, coming = heads[self.index], list[Coming]()
        qkv = q.new_empty(q.shape[0], self.tokens[-1].stop, 3, length(mine), q.shape[3])
        if length(mine):
            for other in self.others:
                coming.append((yield from self._receive(other, "qkv", qkv[:, self.tokens[other]].unbind(0))))
            for each, whole in zip(self._samples, qkv[:, self.tokens[self.index]], strict=True):
                packed(each, mine, whole)  # while they come
        return Gathered(qkv, coming)

    def _attend(self, group: int, gathered: Gathered, attend: AttendMany) -> Generator[Awaited, None, list[Coming]]:
        """Compute this card's heads; send the others their tokens of it, and have theirs come."""
        heads = self.groups[group]
        made: Sequence[Tensor] = ()
        self._keep(gathered.coming)
        if length(heads[self.index]):
            made = attend(*gathered.qkv.unbind(2))
        self.exchange.release_taken()  # the others' copies of what this card sent are behind that
        if made:
            every = slice(None)
            for other in self.others:
                theirs = [each for attended in made for each in attended[:, self.tokens[other]]]
                self._send(other, "attended", [self.carrier.load([each], every) for each in theirs])
        given = []
        for other in self.others:
            if length(heads[other]):
                outs = [each[:, heads[other]].unsqueeze(1) for out in self.outs for each in out]
                given.append((yield from self._receive(other, "attended", outs)))
        for out, attended in zip(self.outs, made, strict=bool(made)):
            copy_in_words(attended[:, self.tokens[self.index]], out[:, :, heads[self.index]])
        return given

    def _send(self, other: int, subject: str, loaded: Sequence[Tensor]) -> None:
        self.exchange.send(self.ranks[other], subject, loaded)

    def _receive(self, other: int, subject: str, outs: Sequence[Tensor]) -> Generator[Awaited, None, Coming]:
        awaited = Awaited(self.ranks[other], subject)
        if not self.exchange.has_come(awaited):
            yield awaited
        rooms = [self.carrier.room(out) for out in outs]
        arrival = self.exchange.receive(self.ranks[other], subject, rooms)
        return Coming(arrival, list(zip(rooms, outs, strict=True)))

    def _keep(self, coming: Sequence[Coming]) -> None:
        """Put what came in its place."""
        for each in coming:
            self.exchange.wait(each.arrival)
            for room, out in each.rooms:
                self.carrier.unload(room, out)
