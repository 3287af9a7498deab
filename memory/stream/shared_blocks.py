"""Blocks in the memory of another source: one copy, in RAM or on a card, feeds several cards."""

from __future__ import annotations

from collections.abc import Sequence

from .host_blocks import HostBlocks
from .host_extents import HostExtents
from .layout import Part
from .parked_blocks import CardExtents, ParkedBlocks


class SharedBlocks(HostExtents):
    """What HostBlocks is to its streamer, to the streamer of another card; the owner reads, pins and frees.

    Nothing of it may be in use when the owner is refilled, unpinned or released. What the owner could not pin travels
    through a pinned staging pair of this source's own.
    """

    def __init__(self, owner: HostBlocks) -> None:
        super().__init__(owner.layouts, owner.extents)
        self._owner = owner

    def prepare(self, order: Sequence[int], part: Part, in_stages: bool = False) -> None:
        """As `HostBlocks.prepare`, but that nothing more is pinned."""
        unpinned = [index for index in order if not self._owner.is_pinned(index)]
        self._stage(unpinned, part, in_stages, self._owner.budget)


class SharedParked(CardExtents):
    """What ParkedBlocks is to its streamer, to the streamer of another card; the owner reads and frees.

    Nothing of it may be in use when the owner is released. `staged` is for this card's way to the blocks.
    """

    def __init__(self, owner: ParkedBlocks, staged: bool) -> None:
        super().__init__(owner.layouts, owner.extents, staged, owner.budget)
