"""Blocks that have different homes: some in one source, some in others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .host_blocks import HostBlocks
from .layout import BlockLayout, Part
from .staging import Fence
from .streamer import BlockSource


class Home(BlockSource, Protocol):
    """A source that holds memory."""

    @property
    def pinned_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    def release(self) -> None: ...


@dataclass(frozen=True, eq=False)
class HomeOf:
    """A source of some of the blocks, by their numbers in the order that it has them."""

    source: Home
    blocks: tuple[int, ...]


class SplitBlocks:
    """The same to a streamer as HostBlocks: each block comes from the home that has it.

    Homes may be taken away and given (`leave`, `settle`) while no streamer is loaded.
    """

    extents: None = None  # not all of them are in RAM

    def __init__(self, layouts: Sequence[BlockLayout]) -> None:
        self.layouts = tuple(layouts)
        self.homes: list[HomeOf] = []
        self._place: dict[int, tuple[Home, int]] = {}  # of each block: its source, and its number there

    @property
    def homeless(self) -> list[int]:
        """Blocks that no source has."""
        return [index for index in range(len(self.layouts)) if index not in self._place]

    @property
    def pinned_bytes(self) -> int:
        return sum(home.source.pinned_bytes for home in self.homes)

    @property
    def host_bytes(self) -> int:
        return sum(home.source.host_bytes for home in self.homes)

    def settle(self, blocks: Collection[int], make: Callable[[Sequence[BlockLayout]], Home]) -> None:
        """Have these blocks in what `make` makes of their layouts; nothing for none."""
        numbers = tuple(sorted(blocks))
        if numbers:
            source = make([self.layouts[index] for index in numbers])
            self.homes.append(HomeOf(source, numbers))
            self._place |= {index: (source, place) for place, index in enumerate(numbers)}

    def leave(self, source: Home) -> None:
        """Free a source; its blocks have no home from here on."""
        source.release()
        self.homes = [home for home in self.homes if home.source is not source]
        self._place = {index: place for index, place in self._place.items() if place[0] is not source}

    def unpin(self) -> None:
        """Give the pinned memory of what is in RAM back and keep the bytes. Unload the streamer first."""
        for home in self.homes:
            if isinstance(home.source, HostBlocks):
                home.source.unpin()

    # What a streamer asks of its source

    def prepare(self, order: Sequence[int], part: Part, in_stages: bool = False) -> None:
        for home in self.homes:
            places = {index: place for place, index in enumerate(home.blocks)}
            home.source.prepare([places[index] for index in order if index in places], part, in_stages)

    def available(self, index: int, stage: int = 0) -> bool:
        source, place = self._place[index]
        return source.available(place, stage)

    def pieces(self, index: int, stage: int = 0) -> list[tuple[Tensor, int]]:
        source, place = self._place[index]
        return source.pieces(place, stage)

    def sent(self, index: int, fence: Fence) -> None:
        source, place = self._place[index]
        source.sent(place, fence)

    def fetch(self, index: int, part: Part, out: Tensor) -> None:
        source, place = self._place[index]
        source.fetch(place, part, out)

    def pause(self) -> None:
        for home in self.homes:
            home.source.pause()

    def release(self) -> None:
        """Free all homes; calling it again does nothing. Unload the streamer first."""
        for home in list(self.homes):
            self.leave(home.source)
