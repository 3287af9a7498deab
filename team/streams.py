"""The streams that cards compute on, as threads and failures see them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch

from ..system.operators import on_device
from .mail import TeamError

IDLE_SECONDS = 60.0  # a card that failed is done with what it was given long before
_POLL_SECONDS = 0.002


class Stream(Protocol):
    """A device's stream, so far as it is waited for."""

    def query(self) -> bool:
        """Whether all that it was given is done."""
        ...


class CallerStreams:
    """Those on which the thread that makes one computes, on each of these devices.

    Other threads that go on with them find what it made, and it what they made, without an event between.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        cards = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self._streams = [torch.cuda.current_stream(card) for card in cards]

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """This thread computes on them, and on this device where none is named: there Triton launches its kernels."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(on_device(device))
            yield


def wait_until_idle(streams: Sequence[Stream], device: torch.device, seconds: float = IDLE_SECONDS) -> None:
    """The host waits until all that these streams were given is done; TeamError where that takes so long.

    PyTorch's own wait for a card that hangs, or has gone, never ends.
    """
    deadline = time.monotonic() + seconds
    while not all([stream.query() for stream in streams]):
        if time.monotonic() > deadline:
            raise TeamError(
                f"{device} has not done in {seconds:g} s what it was given: it hangs or has gone; look at nvidia-smi, "
                "and leave that card out of the devices"
            )
        time.sleep(_POLL_SECONDS)


def wait_for_device(device: torch.device, seconds: float = IDLE_SECONDS) -> None:
    """The host waits for all that a GPU was given; TeamError where what it computes for this thread takes so long."""
    wait_until_idle([torch.cuda.current_stream(device)], device, seconds)
    torch.cuda.synchronize(device)
