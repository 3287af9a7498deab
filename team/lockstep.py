"""Several cards' blocks asked for by one thread, so that none waits for another to be woken at every attention.

A thread that hands its turn over sleeps, and the one that it wakes waits for a processor: on a machine that has other
work some milliseconds, and more than it takes to ask for a block of a short video. With nothing else on the machine
17 frames at 480p take two H200s 0.246 s by one thread (`benchmarks/results/several_cards_two_h200_2026-11-30.json`) and
0.315 by two in turns (`several_cards_turns_two_h200_2026-11-30.json`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..system.operators import on_device
from .exchange import Awaited, Exchange

Steps = Generator[Awaited, None, None]  # of an attention to all cards' tokens; see `HeadExchange.steps`


@dataclass(frozen=True)
class Blocks:
    """A card's blocks of a pass: who takes the next one has asked the card for all of a block."""

    blocks: Iterator[None]
    exchange: Exchange
    device: torch.device


@dataclass
class _Attention:
    steps: Steps
    exchange: Exchange
    device: torch.device
    awaited: Awaited | None = None
    done: bool = False

    @property
    def goes_on(self) -> bool:
        return self.awaited is None or self.exchange.has_come(self.awaited)


class Lockstep:
    """The cards that share a pass, each of whose blocks attends to all cards' tokens once, or not at all.

    The thread whose this is takes its own card through the blocks. Where that attends, the first of the `followers`
    goes on to the same attention, there the next one, and so on: when the last one is there, all of them can be
    finished. Then each, the last one first, goes on to the end of its block.
    """

    def __init__(self, leader: int, followers: Sequence[Blocks]) -> None:
        self._leader, self._followers = leader, followers
        self._begun: list[_Attention] = []  # of one attention, in the order of the cards

    def attend(self, steps: Steps, exchange: Exchange, device: torch.device) -> None:
        """Take a card's attention to its end, and those of the cards after it."""
        own, number = _Attention(steps, exchange, device), len(self._begun)
        self._begun.append(own)
        self._advance(own)
        if number == len(self._followers):
            self._finish()
            return
        follower = self._followers[number]
        while not own.done:
            with self._asking(follower.exchange, follower.device):
                next(follower.blocks)

    def _finish(self) -> None:
        begun, self._begun = self._begun, []
        while waiting := [each for each in begun if not each.done]:
            ready = [each for each in waiting if each.goes_on]
            assert ready, f"cards wait for each other: {[each.awaited for each in waiting]}"
            for each in ready:
                self._advance(each)

    def _advance(self, attention: _Attention) -> None:
        """Go on until something is needed that was not sent yet."""
        with self._asking(attention.exchange, attention.device):
            attention.awaited = next(attention.steps, None)
        attention.done = attention.awaited is None

    @contextmanager
    def _asking(self, exchange: Exchange, device: torch.device) -> Iterator[None]:
        """Ask a card, which is named should it hang."""
        asked = exchange.mail.asked
        before, asked[self._leader] = asked[self._leader], exchange.rank
        try:
            with on_device(device):
                yield
        finally:
            asked[self._leader] = before
