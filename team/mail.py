"""Letters between the threads of several cards, which take turns; whoever waits is woken when the team is stopped.

Threads that ask their cards for work at the same time wake each other for Python's lock at every call: two took
nearly four times as long as one at 17 frames (`benchmarks/results/several_cards_at_once_two_h200_2026-11-29.json`),
and in turns 1.7 times (`several_cards_two_h200_2026-11-29.json`). So one runs at a time, until what it needs of
another is not there: cards are some milliseconds behind their threads. Whoever is woken may have to wait for a
processor, so turns are few: `lockstep.py` has one thread ask for all blocks of a pass where it can.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

TIMEOUT_SECONDS = 600.0  # between two letters lies a block at most, and once a compilation
_POLL_SECONDS = 0.1  # waits are cut into such slices so that Ctrl-C works on every system

Key = tuple[int, int, Hashable]  # sender, receiver, subject
Choose = Callable[[Sequence[int]], int]


class TeamError(RuntimeError):
    """The cards that share a pass cannot go on together."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


class TeamStopped(TeamError):
    """Another card failed, or the run was interrupted: this one's part of the pass is of no use."""


def first_of(ranks: Sequence[int]) -> int:
    return ranks[0]


class Mail:
    """What `num_cards` threads tell each other, in order for each sender, receiver and subject.

    Where they take turns, one that waits for a letter, or leaves, gives its turn to the next one that can go on:
    `choose` has them in the order of their numbers behind its own.
    """

    def __init__(self, num_cards: int, timeout_seconds: float = TIMEOUT_SECONDS, choose: Choose = first_of) -> None:
        self.num_cards, self.timeout_seconds, self.choose = num_cards, timeout_seconds, choose
        self._lock = threading.Lock()
        self._woken = [threading.Condition(self._lock) for _ in range(num_cards)]
        self.begin(in_turns=False)

    def begin(self, in_turns: bool) -> None:
        """Forget all letters: another pass begins, and nobody is in one. The first has the first turn."""
        with self._lock:
            self._letters: dict[Key, deque[Any]] = defaultdict(deque)
            self._awaited: list[Key | None] = [None] * self.num_cards
            self._inside = [True] * self.num_cards  # not yet gone
            self.asked = list(range(self.num_cards))  # whom each card's thread asks: its own, or see `Lockstep`
            self._turn = 0 if in_turns else None  # whose it is; None: nobody waits for one
            self.num_turns = self._num_letters = 0  # given and sent so far
            self._stopped = False

    def enter(self, rank: int) -> None:
        """Wait for one's first turn. Raises TeamStopped, and TeamError where another's does not end in time."""
        with self._lock:
            self._wait(rank)

    def leave(self, rank: int) -> None:
        """This card's part of the pass is over."""
        with self._lock:
            self._inside[rank] = False
            self._pass_turn(rank)

    def put(self, sender: int, receiver: int, subject: Hashable, letter: Any) -> None:
        """Send a letter; nobody waits. Raises TeamStopped."""
        with self._lock:
            self.check()
            self._letters[sender, receiver, subject].append(letter)
            self._num_letters += 1
            if self._turn is None:
                self._woken[receiver].notify_all()

    def take(self, sender: int, receiver: int, subject: Hashable) -> Any:
        """The next such letter; waits for it. Raises TeamStopped, and TeamError where none comes (in time)."""
        key = sender, receiver, subject
        with self._lock:
            self.check()
            if not self._letters[key]:
                self._awaited[receiver] = key
                self._pass_turn(receiver)
                self._wait(receiver)
                self._awaited[receiver] = None
            return self._letters[key].popleft()

    def has(self, sender: int, receiver: int, subject: Hashable) -> bool:
        """Whether `take` would return at once."""
        with self._lock:
            return bool(self._letters.get((sender, receiver, subject)))

    def check(self) -> None:
        """Raises TeamStopped where the team was stopped."""
        if self._stopped:
            raise TeamStopped("another card failed or was stopped in the middle of a pass")

    def stop(self) -> None:
        """Wake everyone who waits, and let nobody go on."""
        with self._lock:
            self._stopped = True
            for woken in self._woken:
                woken.notify_all()

    def forget(self) -> None:
        """Let go of letters that nobody takes any more: they hold what was made."""
        with self._lock:
            self._letters.clear()

    @property
    def _signs_of_life(self) -> tuple[int, int]:
        return self.num_turns, self._num_letters

    def _goes_on(self, rank: int) -> bool:
        awaited = self._awaited[rank]
        return self._inside[rank] and (awaited is None or bool(self._letters.get(awaited)))

    def _pass_turn(self, rank: int) -> None:
        if self._turn != rank or self._stopped:
            return
        behind = ((rank + step) % self.num_cards for step in range(1, self.num_cards))
        ready = [other for other in behind if self._goes_on(other)]
        if ready:
            self._turn = self.choose(ready)
            self.num_turns += 1
            self._woken[self._turn].notify_all()
        elif any(self._inside):
            sender, receiver, subject = next(key for key in self._awaited if key is not None)
            raise TeamError(f"card {receiver} waits for {subject!r} of card {sender}, which will send none")

    def _wait(self, rank: int) -> None:
        """Until it is this card's turn, or where there are none, until the letter is there that it waits for."""
        seen, deadline = self._signs_of_life, time.monotonic() + self.timeout_seconds
        while not (self._goes_on(rank) if self._turn is None else self._turn == rank):
            self.check()
            if self._signs_of_life != seen:  # the others get on
                seen, deadline = self._signs_of_life, time.monotonic() + self.timeout_seconds
            left = deadline - time.monotonic()
            if left <= 0:
                raise TeamError(self._hanging(rank))
            self._woken[rank].wait(min(left, _POLL_SECONDS))
        self.check()

    def _hanging(self, rank: int) -> str:
        awaited = self._awaited[rank]
        silent = self._turn if self._turn is not None or awaited is None else awaited[0]
        silent = silent if silent is None else self.asked[silent]
        return (
            f"card {silent} has sent nothing to card {rank} for {self.timeout_seconds:g} s: it hangs or has gone; look "
            "at nvidia-smi, and leave that card out of the devices"
        )
