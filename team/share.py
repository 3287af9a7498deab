"""What of a pass one card has: some tokens for products, some heads for attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..system.torch_compiler import outside_graphs
from .carriers import AS_THEY_ARE, Carrier
from .exchange import Exchange
from .heads import Attend, AttendMany, HeadExchange
from .lockstep import Blocks, Lockstep
from .spans import even_spans, group_sizes, length, run_length

T = TypeVar("T")

QKV = tuple[Tensor, Tensor, Tensor]
AttendShared = Callable[[QKV, Sequence[Tensor], AttendMany, int], None]


@dataclass(frozen=True)
class Share:
    """A card's place among those that share a pass: `ranks` of the team, of which the exchange's own is one.

    Where they are given, attention goes by groups of heads of these `sizes`, which hide what is exchanged: those of a
    card with the most heads (see `hiding.py`). What is exchanged travels by the `carrier`. `in_step`: one thread may
    ask for all cards' blocks.
    """

    exchange: Exchange
    ranks: tuple[int, ...]
    sizes: tuple[int, ...] | None = None
    carrier: Carrier = AS_THEY_ARE
    in_step: bool = True

    def part(self, num_tokens: int, run: int = 1) -> Part:
        """This card's tokens of a pass over so many of each sample, shared out in whole runs of `run`."""
        if num_tokens // run < len(self.ranks):
            raise ValueError(
                f"{num_tokens} tokens cannot be shared by {len(self.ranks)} cards: use fewer cards, or make a larger "
                "video"
            )
        spans = even_spans(num_tokens // run, len(self.ranks))
        return Part(self, tuple(slice(span.start * run, span.stop * run) for span in spans))

    def run_of(self, num_tokens: int, num_times: int) -> int:
        """The runs in which tokens are shared out that have so many timesteps in turn: each run has one."""
        return 1 if num_times == 1 else run_length(num_tokens // num_times, len(self.ranks))

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first of the cards decides, known to all of them."""
        first, rank, mail = self.ranks[0], self.exchange.rank, self.exchange.mail
        if rank != first:
            decided: T = mail.take(first, rank, "decided")
            return decided
        decided = decide()
        for other in self.ranks[1:]:
            mail.put(first, other, "decided", decided)
        return decided


class Part:
    """The tokens that each card has in one pass, of every sample the same: `spans` in the order of the ranks."""

    def __init__(self, share: Share, spans: tuple[slice, ...]) -> None:
        self.share, self.spans = share, spans
        self.index = share.ranks.index(share.exchange.rank)
        self.mine = spans[self.index]
        # no decorator: it would bring torch's compiler, 150 MB of RAM, to whoever imports this
        self.attend: Callable[[Tensor, Tensor, Tensor, Attend, int], None] = outside_graphs(self.attend_now)
        self.attend_many: AttendShared = outside_graphs(self.attend_many_now)
        self.lockstep: Lockstep | None = None  # while one thread asks for all cards

    @property
    def num_mine(self) -> int:
        """This card's tokens of a sample."""
        return length(self.mine)

    def own(self, tokens: slice) -> slice:
        """Where, in this card's rows of a sample, those of these tokens are that it has."""
        start, stop = (min(max(end - self.mine.start, 0), self.num_mine) for end in (tokens.start, tokens.stop))
        return slice(start, stop)

    def every(self, step: int) -> Part:
        """The same cards' parts of one in so many tokens; a card may have none of them."""
        return Part(self.share, tuple(slice(-(-span.start // step), -(-span.stop // step)) for span in self.spans))

    def within(self, tokens: slice) -> Part:
        """The same cards' parts of some tokens alone; a card may have none of them."""
        ends = [min(max(span.stop, tokens.start), tokens.stop) - tokens.start for span in self.spans]
        return Part(self.share, tuple(slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)))

    def cut(self, rows: Tensor, batch: int = 1) -> Tensor:
        """This card's of `rows [B * tokens, ...]` in memory of their own: `[B * mine, ...]`."""
        return rows.unflatten(0, (batch, -1))[:, self.mine].clone().flatten(0, 1)

    def of_runs(self, groups: Tensor, num_times: int, batch: int, run: int) -> Tensor:
        """What each run of this card's tokens has of `groups [B * times, ...]`: `[B * runs, ...]`."""
        group_size = self.spans[-1].stop // num_times
        firsts = torch.arange(self.mine.start, self.mine.stop, run, device=groups.device)
        return groups.unflatten(0, (batch, num_times))[:, firsts // group_size].flatten(0, 1)

    def gather(self, rows: Tensor, batch: int = 1) -> Tensor:
        """All cards' rows `[B * tokens, ...]`, of this one's `[B * mine, ...]` and the others'."""
        exchange, own = self.share.exchange, rows.unflatten(0, (batch, -1))
        whole = rows.new_empty(batch, self.spans[-1].stop, *rows.shape[1:])
        others = [index for index in range(len(self.spans)) if index != self.index]
        for other in others:
            exchange.send(self.share.ranks[other], "rows", [*own])
        whole[:, self.mine].copy_(own)
        arrivals = [
            exchange.receive(self.share.ranks[other], "rows", [*whole[:, self.spans[other]]]) for other in others
        ]
        for arrival in arrivals:
            exchange.wait(arrival)
        exchange.settle()
        return whole.flatten(0, 1)

    def run(self, blocks: Iterator[None], device: torch.device) -> None:
        """Take this card through its blocks, by one thread with the others where that may be (see `Lockstep`).

        That thread is the last card's: the first one's, which is the caller's, still sees an interrupt meanwhile, and
        a card that hangs.
        """
        share, mail = self.share, self.share.exchange.mail
        (*others, leader), own = share.ranks, share.exchange.rank
        if not share.in_step:
            pass
        elif own != leader:
            mail.put(own, leader, "blocks", (self, Blocks(blocks, share.exchange, device)))
            mail.take(leader, own, "blocks are done")
        else:
            parts, followers = zip(*(mail.take(other, leader, "blocks") for other in others), strict=True)
            self._lead(parts, Lockstep(leader, followers), blocks)
            for other in others:
                mail.put(leader, other, "blocks are done", None)
        for _ in blocks:  # in step, what is behind the last one
            pass

    def _lead(self, others: Sequence[Part], lockstep: Lockstep, blocks: Iterator[None]) -> None:
        try:
            for part in (self, *others):
                part.lockstep = lockstep
            for _ in blocks:
                pass
        finally:
            for part in (self, *others):
                part.lockstep = None

    def total(self, own: Tensor) -> Tensor:
        """The sum of all cards' tensors of one shape, added up in the order of the ranks."""
        num_cards = len(self.spans)
        parts = Part(self.share, even_spans(num_cards * len(own), num_cards))
        return parts.gather(own).unflatten(0, (num_cards, -1)).sum(0)

    def attend_now(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, num_groups: int) -> None:
        """Replace `q [B, mine, H, D]` by its attention to all cards' tokens, of which k and v are this one's."""
        self.attend_many_now((q, k, v), (), lambda *qkv: [attend(*qkv)], num_groups)

    def attend_many_now(self, qkv: QKV, outs: Sequence[Tensor], attend: AttendMany, num_groups: int) -> None:
        """The same where `attend` makes several results: the first replaces q, others come to `outs` of its shape."""
        share, num_heads = self.share, -(-qkv[0].shape[2] // len(self.spans))
        sizes = share.sizes or group_sizes(num_heads, num_groups)
        exchange = HeadExchange(share.exchange, share.ranks, self.spans, qkv, sizes, outs, share.carrier)
        if self.lockstep is None:
            exchange.run(attend)
        else:
            self.lockstep.attend(exchange.steps(attend), share.exchange, qkv[0].device)
