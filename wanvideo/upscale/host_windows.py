"""Keys and values of earlier windows in host memory, brought to the device layer by layer while others compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...memory.stream.pinned import PinnedBudget, PinnedMemory
from ...memory.stream.streams import BlockEvents, streams_for
from ...system.host_memory import allocate_on_disk

FIRST_WINDOWS = 3  # that a video's first pass has
FEWEST = 2  # windows that are kept at least


@dataclass(frozen=True)
class WindowSize:
    """Numbers of one window: `rows` tokens of width `dim` in each of `num_layers` layers, `kept` of them remembered."""

    num_layers: int
    rows: int
    dim: int
    dtype: torch.dtype
    kept: int = 3

    @property
    def nbytes(self) -> int:
        """Of a window's keys in one layer, and of its values."""
        return self.rows * self.dim * self.dtype.itemsize

    @property
    def most(self) -> int:
        """Windows that are kept at most."""
        return max(self.kept, FEWEST)

    @property
    def slots(self) -> int:
        """Places of windows in each layer: those that are kept, and one for the next."""
        return max(self.most + 1, FIRST_WINDOWS)

    @property
    def host_bytes(self) -> int:
        return 2 * self.num_layers * self.slots * self.nbytes

    @property
    def kept_bytes(self) -> int:
        """Of those that are kept."""
        return 2 * self.num_layers * self.most * self.nbytes

    def device_bytes(self, first: bool) -> int:
        """Of keys and values of the pass, the `first` or a later one.

        Later ones have those of two layers, one of which arrive while the others are used.
        """
        return 2 * FIRST_WINDOWS * self.nbytes if first else 2 * 2 * (self.most + 1) * self.nbytes


class HostWindows:
    """A `WindowMemory`; what a pass adds counts from `commit` on, so that one that failed can be done again.

    `budget` pins the memory, as far as it may. With a `folder` it is files there instead. MemoryError, or OSError,
    where there is not so much.
    """

    def __init__(
        self, size: WindowSize, device: torch.device, budget: PinnedBudget | None = None, folder: Path | None = None
    ) -> None:
        self.size, self._device, self._memory = size, device, PinnedMemory(budget)
        self.windows = range(0)  # those that are kept, by their numbers in the video
        self._streams = streams_for(device)
        self._extents: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._events: list[BlockEvents] = []
        self._new = 0  # windows of this pass
        self._room = 0  # windows that a buffer has room for
        try:
            for layer in range(size.num_layers):
                nbytes = 2 * size.slots * size.nbytes
                if folder is not None:
                    self._extents.append(allocate_on_disk(folder / f"windows_{layer:03d}", nbytes))
                else:
                    self._extents.append(self._memory.allocate(nbytes))
        except BaseException:
            self.release()
            raise

    def begin_pass(self) -> None:
        """A pass begins, perhaps once more."""
        self.end_pass()
        first = not self.windows
        self._room = FIRST_WINDOWS if first else self.size.most + 1
        whole = torch.empty(self.size.device_bytes(first), dtype=torch.uint8, device=self._device)
        self._buffers = [whole] if first else list(whole.chunk(2))
        self._events = [self._streams.events(layer) for layer in range(self.size.num_layers)]
        self._streams.record_free(self._events[0])  # whoever had these bytes before
        self._fetch(0, [self._events[0]])

    def end_pass(self) -> None:
        """Nobody needs the device's memory any more."""
        self._streams.synchronize()
        self._buffers, self._events = [], []

    def commit(self) -> None:
        """The pass is done: its windows are remembered, and the oldest is forgotten where there are too many."""
        self.end_pass()
        windows = range(self.windows.start, self.windows.stop + self._new)
        self.windows = windows[1:] if len(windows) > self.size.kept else windows

    def open(self, layer: int, num_new: int) -> tuple[Tensor, Tensor]:
        """See `WindowMemory`."""
        assert num_new % self.size.rows == 0
        self._new = num_new // self.size.rows
        self._streams.wait_ready(self._events[layer])
        if layer + 1 < self.size.num_layers:
            # its bytes are free once the layer before this one is done; in the first pass nothing is fetched
            before = [] if layer == 0 else [self._events[layer - 1]]
            self._fetch(layer + 1, before)
        count = len(self.windows) + self._new
        keys, values = (self._part(layer, which, 0, count) for which in (0, 1))
        shape = (count * self.size.rows, self.size.dim)
        return keys.view(self.size.dtype).view(shape), values.view(self.size.dtype).view(shape)

    def close(self, layer: int) -> None:
        """See `WindowMemory`."""
        self._streams.record_free(self._events[layer])
        kept = len(self.windows)
        pairs = []
        for number in range(self._new):
            slot = (self.windows.stop + number) % self.size.slots
            for which in (0, 1):
                pairs.append((self._slot(layer, which, slot), self._part(layer, which, kept + number, 1)))
        self._streams.copy(pairs, [self._events[layer]], self._events[layer])
        # the next layer but one is fetched into these bytes once they are in host memory: on the same stream
        if len(self._buffers) == 1:
            self._streams.wait_ready(self._events[layer])  # the next layer writes there

    def state(self) -> Iterator[tuple[int, Tensor]]:
        """Layer by layer, uint8: the windows that are kept, keys and values of each, oldest first."""
        for layer in range(self.size.num_layers):
            yield layer, torch.stack([self._slot(layer, which, slot) for slot, which in self._kept_slots()])

    def restore(self, windows: range, layers: Iterable[tuple[int, Tensor]]) -> None:
        """What `state` gave when these windows were kept. ValueError for what is of other sizes."""
        self.windows = windows
        for layer, stored in layers:
            if stored.shape != (2 * len(windows), self.size.nbytes) or len(windows) > self.size.most:
                raise ValueError(f"windows of {list(stored.shape)} bytes are no use here")
            for (slot, which), each in zip(self._kept_slots(), stored, strict=True):
                self._slot(layer, which, slot).copy_(each)

    def release(self) -> None:
        """Give the memory back; calling it again does nothing."""
        self.end_pass()
        self._memory.unpin()
        self._extents = []

    @property
    def pinned_bytes(self) -> int:
        return self._memory.pinned_bytes

    def _kept_slots(self) -> list[tuple[int, int]]:
        return [(number % self.size.slots, which) for number in self.windows for which in (0, 1)]

    def _fetch(self, layer: int, after: list[BlockEvents]) -> None:
        pairs = [
            (self._part(layer, which, place, 1), self._slot(layer, which, number % self.size.slots))
            for place, number in enumerate(self.windows)
            for which in (0, 1)
        ]
        self._streams.copy(pairs, after, self._events[layer])

    def _slot(self, layer: int, which: int, slot: int) -> Tensor:
        """A window's bytes in host memory."""
        first = (which * self.size.slots + slot) * self.size.nbytes
        return self._extents[layer][first : first + self.size.nbytes]

    def _part(self, layer: int, which: int, place: int, count: int) -> Tensor:
        """The bytes of some windows on the device."""
        first = (which * self._room + place) * self.size.nbytes
        return self._buffers[layer % len(self._buffers)][first : first + count * self.size.nbytes]
