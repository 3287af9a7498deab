"""One card's end of what the cards of a team exchange."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .link import Link, Mark
from .mail import Mail


@dataclass(frozen=True, eq=False)
class _Sent:
    receiver: int
    subject: Hashable
    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class Awaited:
    """What a card needs of another before it goes on."""

    sender: int
    subject: Hashable


@dataclass(frozen=True, eq=False)
class Arrival:
    """Tensors on their way; `Exchange.wait` says when they are there."""

    mark: Mark
    tensors: Sequence[Tensor]


class Exchange:
    """Tensors to and from the other cards, by their numbers in the team.

    What is sent is held until the other has it, which is looked at by `release_taken`: the host does not wait for that
    but at the end (`settle`), and never for a device. What is received is there once it was waited for. All methods
    belong to one thread at a time: the card's own, or while that waits the one that asks for all cards' blocks.
    """

    def __init__(self, rank: int, mail: Mail, link: Link) -> None:
        self.rank, self.mail, self.link = rank, mail, link
        self._sent: deque[_Sent] = deque()
        self._arriving: deque[Arrival] = deque()

    def send(self, receiver: int, subject: Hashable, tensors: Sequence[Tensor]) -> None:
        """Let another card have contiguous tensors, which nobody writes to again."""
        offered, mark = self.link.offer(tensors)
        self._sent.append(_Sent(receiver, subject, tensors))
        self.mail.put(self.rank, receiver, subject, (offered, mark))

    def has_come(self, awaited: Awaited) -> bool:
        """Whether it was sent, so that `receive` returns at once."""
        return self.mail.has(awaited.sender, self.rank, awaited.subject)

    def receive(self, sender: int, subject: Hashable, outs: Sequence[Tensor]) -> Arrival:
        """Have the tensors that another card sent come to `outs`, contiguous ones of the same shapes."""
        offered, after = self.mail.take(sender, self.rank, subject)
        mark = self.link.fetch(zip(outs, offered, strict=True), after)
        arrival = Arrival(mark, outs)
        self._arriving.append(arrival)
        self.mail.put(self.rank, sender, ("taken", subject), mark)
        return arrival

    def wait(self, arrival: Arrival) -> None:
        """What is computed from here on finds the tensors there."""
        self.link.wait(arrival.mark)
        self._arriving = deque(other for other in self._arriving if other is not arrival)

    def release_taken(self) -> None:
        """Let go of what others have taken: compute goes on behind their copies of it, so that is asked for late."""
        for sent in list(self._sent):
            if self.mail.has(sent.receiver, self.rank, ("taken", sent.subject)):
                self._forget(sent)

    def settle(self) -> None:
        """Wait until all that was sent has been taken: then its bytes may be written to."""
        while self._sent:
            self._forget(self._sent[0])

    def abandon(self) -> None:
        """A pass has failed, on this card or another: wait for the device, and forget what was on its way."""
        try:
            self.link.synchronize()
        finally:
            self._sent.clear()
            self._arriving.clear()

    def _forget(self, sent: _Sent) -> None:
        # the bytes are somebody else's only behind the copy
        self.link.wait(self.mail.take(sent.receiver, self.rank, ("taken", sent.subject)))
        self._sent.remove(sent)
