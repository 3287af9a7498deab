"""Letters between the threads of several cards; whoever waits for one is woken when the team is stopped."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Hashable
from typing import Any

TIMEOUT_SECONDS = 600.0  # between two letters lies a block at most, and once a compilation
_POLL_SECONDS = 0.1  # waits are cut into such slices so that Ctrl-C works on every system


class TeamError(RuntimeError):
    """The cards that share a pass cannot go on together."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


class TeamStopped(TeamError):
    """Another card failed, or the run was interrupted: this one's part of the pass is of no use."""


class Mail:
    """What `num_cards` threads tell each other, in order for each sender, receiver and subject."""

    def __init__(self, num_cards: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.num_cards, self.timeout_seconds = num_cards, timeout_seconds
        self._changed = threading.Condition()
        self._letters: dict[tuple[int, int, Hashable], deque[Any]] = defaultdict(deque)
        self._stopped = False

    def put(self, sender: int, receiver: int, subject: Hashable, letter: Any) -> None:
        """Send a letter; nobody waits. Raises TeamStopped."""
        with self._changed:
            self._check()
            self._letters[sender, receiver, subject].append(letter)
            self._changed.notify_all()

    def take(self, sender: int, receiver: int, subject: Hashable) -> Any:
        """The next such letter; waits for it. Raises TeamStopped, and TeamError where none comes in time."""
        deadline = time.monotonic() + self.timeout_seconds
        with self._changed:
            while True:
                self._check()
                if waiting := self._letters.get((sender, receiver, subject)):
                    return waiting.popleft()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TeamError(
                        f"card {sender} has sent nothing to card {receiver} for {self.timeout_seconds:g} s: it hangs "
                        "or has gone; look at nvidia-smi, and leave that card out of the devices"
                    )
                self._changed.wait(min(left, _POLL_SECONDS))

    def has(self, sender: int, receiver: int, subject: Hashable) -> bool:
        """Whether `take` would return at once."""
        with self._changed:
            return bool(self._letters.get((sender, receiver, subject)))

    def check(self) -> None:
        """Raises TeamStopped where the team was stopped."""
        with self._changed:
            self._check()

    def stop(self) -> None:
        """Wake everyone who waits, and let nobody go on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def begin(self) -> None:
        """Forget all letters: another pass begins, and nobody is in one."""
        with self._changed:
            self._letters.clear()
            self._stopped = False

    def _check(self) -> None:
        if self._stopped:
            raise TeamStopped("another card failed or was stopped in the middle of a pass")
