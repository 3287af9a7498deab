"""Parts of a video in RAM on their way to the device, each while the device makes something of the last."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_PLACES = 2


class Inbox:
    """Brings parts to a device, each to one of two places in turn.

    The host waits for the copy of a part, as its RAM is not pinned, and for what was made of the last but one; it does
    not wait for the device's other work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(NUM_PLACES)]
        self._read: list[torch.cuda.Event | None] = [None] * NUM_PLACES  # when what has been made of each was made
        self._num_brought = 0

    def bring(self, part: Tensor) -> Tensor:
        """The part on the device, until two further ones have come."""
        if self._stream is None or part.device == self._device:
            return part.to(self._device)
        compute = torch.cuda.current_stream(self._device)
        here, last = self._num_brought % NUM_PLACES, (self._num_brought - 1) % NUM_PLACES
        self._read[last] = compute.record_event()
        self._num_brought += 1
        if len(self._places[here]) < part.nbytes:
            self._places[here] = torch.empty(part.nbytes, dtype=torch.uint8, device=self._device)
            self._read[here] = compute.record_event()  # whoever had this memory before
        place, read = self._places[here][: part.nbytes].view(part.dtype).view(part.shape), self._read[here]
        with torch.cuda.stream(self._stream):
            if read is not None:
                self._stream.wait_event(read)
            place.copy_(part)
        compute.wait_stream(self._stream)
        return place
