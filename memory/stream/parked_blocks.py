"""Blocks in the memory of another card than the one that computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...system.host_memory import allocate_bytes
from .host_extents import HostExtents
from .layout import BlockLayout, Part, TensorSource
from .pinned import PinnedBudget


class CardExtents(HostExtents):
    """Blocks in a card's memory, as one that computes copies them: with `staged` through a pinned pair in RAM.

    That is for cards that do not reach each other.
    """

    _num_threads = 2  # a copy from a card is one thread's work

    def __init__(
        self, layouts: Sequence[BlockLayout], extents: list[Tensor], staged: bool, budget: PinnedBudget | None
    ) -> None:
        super().__init__(layouts, extents)
        self.staged, self.budget = staged, budget

    def prepare(self, order: Sequence[int], part: Part, in_stages: bool = False) -> None:
        """Blocks `order` will be copied to the device over and over, this part of each, whole or stage by stage."""
        self._stage(order if self.staged else (), part, in_stages, self.budget)


class ParkedBlocks(CardExtents):
    """All of these blocks on a card, read once, from where the one that computes copies them.

    `check` is called before each tensor is read and may raise to give up. Raises what the card says where it has no
    room.
    """

    def __init__(
        self,
        source: TensorSource,
        layouts: Sequence[BlockLayout],
        card: torch.device,
        staged: bool = False,
        budget: PinnedBudget | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        extents: list[Tensor] = []
        super().__init__(layouts, extents, staged, budget)
        self.card = card
        with torch.inference_mode(False):
            memory = torch.empty(sum(layout.nbytes for layout in layouts), dtype=torch.uint8, device=card)
        extents.extend(memory.split([layout.nbytes for layout in layouts]))
        self._read(source, check)

    @property
    def parked_bytes(self) -> int:
        """Bytes of the card."""
        return sum(extent.numel() for extent in self.extents)

    def release(self) -> None:
        """Give the card's memory back; calling it again does nothing. Unload the streamer first."""
        self.pause()
        self.extents.clear()

    def _read(self, source: TensorSource, check: Callable[[], None] | None) -> None:
        """Through pageable RAM, a tensor at a time."""
        for layout, extent in zip(self.layouts, self.extents, strict=True):
            for place in layout.places:
                if check is not None:
                    check()
                raw = allocate_bytes(place.nbytes)
                source.read_into(f"{layout.prefix}.{place.name}", raw)
                extent[place.offset : place.offset + place.nbytes].copy_(raw)
