"""How bytes come from one card to another: on copy streams, ordered against compute by events alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..system.card_links import CardStreams, reaches
from .staging import CudaLegs, Mark, StagedCopies
from .streams import wait_until_idle


class Link(Protocol):
    """One card's copies from others; none of this makes the host wait but `synchronize`."""

    def offer(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Mark]:
        """What another card may fetch for these contiguous tensors, once the mark is passed."""
        ...

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        """Copy each (own, other's offered) pair of one shape after a mark of the other; the mark of its end.

        What compute has been given before is waited for too: the own bytes may still have been in use.
        """
        ...

    def wait(self, mark: Mark) -> None:
        """What compute is given from here on waits for a mark, of this card or another."""
        ...

    def synchronize(self) -> None:
        """The host waits for all that was given to this card; TeamError where the card does not end it."""
        ...


class HostLink:
    """Of a device without streams, such as the CPU: everything is done when it is asked for."""

    def offer(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Mark]:
        return tensors, None

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        for own, other in pairs:
            own.copy_(other)

    def wait(self, mark: Mark) -> None:
        return

    def synchronize(self) -> None:
        return


class CudaLink:
    """Copies by the driver, from card to card where these reach each other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._copies = CardStreams(self._stream)

    def offer(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Mark]:
        return tensors, self._mark(torch.cuda.current_stream(self.device))

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        self._stream.wait_event(self._mark(torch.cuda.current_stream(self.device)))
        self._stream.wait_event(after)
        for own, other in pairs:
            self._copies.copy(own, other)
        return self._mark(self._stream)

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def synchronize(self) -> None:
        wait_until_idle([self._stream, torch.cuda.current_stream(self.device)], self.device)

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


class StagedLink(CudaLink):
    """Copies through pinned RAM, for cards that do not reach each other, as most GeForce cards do not."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._legs = CudaLegs(self._stream)
        self._staged = StagedCopies(self._legs)

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        self._stream.wait_event(self._mark(torch.cuda.current_stream(self.device)))
        return self._staged.copy(pairs, after)

    def synchronize(self) -> None:
        wait_until_idle(self._legs.streams, self.device)
        super().synchronize()


def links_for(devices: Sequence[torch.device], staged: bool = False) -> list[Link]:
    """A link for each card of a team; through RAM where one of them does not reach another, or by `staged`."""
    if any(device.type != "cuda" for device in devices):
        return [HostLink() for _ in devices]
    pairs = [(one, other) for one in devices for other in devices if one != other]
    if staged or not all(reaches(one, other) for one, other in pairs):
        return [StagedLink(device) for device in devices]
    return [CudaLink(device) for device in devices]
