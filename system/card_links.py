"""How cards reach each other, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from .device_errors import is_out_of_memory
from .kernel_choice import cuda_seconds

PROBE_BYTES = 64 << 20
ASSUMED_GBPS = 12.0  # of what cannot be measured here


class CardStreams:
    """Copies to a card from others, issued on streams of our own on both.

    PyTorch issues such a copy on the current stream of the card it is from and joins that with the current one of the
    card it is to: so neither card's compute is waited for.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """`stream` is the one on the card that copies come to."""
        self._stream = stream
        self._there: dict[torch.device, torch.cuda.Stream] = {}  # a stream of ours on each other card

    def copy(self, own: Tensor, other: Tensor) -> None:
        """Have the other's bytes come, from another card or from RAM; nothing waits."""
        if other.device.type != "cuda" or other.device == self._stream.device:
            with torch.cuda.stream(self._stream):
                own.copy_(other, non_blocking=True)
            return
        if other.device not in self._there:
            self._there[other.device] = torch.cuda.Stream(other.device)
        with torch.cuda.stream(self._there[other.device]), torch.cuda.stream(self._stream):
            own.copy_(other, non_blocking=True)


def numbered(device: torch.device) -> torch.device:
    """The same device by its number, where it is a GPU: what is current is another matter in each thread."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def reaches(device: torch.device, other: torch.device) -> bool:
    """Whether the driver copies from one card to another without RAM between; what is no GPU lies in RAM itself."""
    if device.type != "cuda" or other.type != "cuda" or device == other:
        return True
    return torch.cuda.can_device_access_peer(device, other)


@cache
def measured_gbps(device: torch.device, other: torch.device, staged: bool) -> float:
    """GB/s of a copy to `device` from another card, through pinned RAM where `staged`.

    What has no copies to measure, or no memory left for it, is assumed to be a slow slot.
    """
    if device.type != "cuda" or other.type != "cuda":
        return ASSUMED_GBPS
    try:
        here, there = (torch.empty(PROBE_BYTES, dtype=torch.uint8, device=card) for card in (device, other))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return ASSUMED_GBPS
    if not staged:
        return PROBE_BYTES / _copy_seconds(here, there, device) / 1e9
    # the two halves of the way overlap: the slower one counts
    pinned = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    return PROBE_BYTES / max(_copy_seconds(pinned, there, other), _copy_seconds(here, pinned, device)) / 1e9


def slowest_link(cards: Sequence[torch.device], staged: bool = False) -> float | None:
    """GB/s of the slowest way between two of these cards, through RAM where `staged` or where one cannot reach another.

    None where there is none to measure.
    """
    if len(set(cards)) < 2 or any(card.type != "cuda" for card in cards):
        return None
    through = staged or not all(reaches(one, other) for one, other in permutations(cards, 2))
    return min(measured_gbps(one, other, through) for one, other in permutations(cards, 2))


def _copy_seconds(out: Tensor, source: Tensor, card: torch.device) -> float:
    with torch.cuda.device(card):
        return cuda_seconds(lambda: out.copy_(source, non_blocking=True), card)
