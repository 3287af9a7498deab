"""Blocks in the host memory of another source: one copy in RAM feeds several cards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .host_blocks import HostBlocks, stage_blocks
from .layout import BlockLayout, Part
from .staging import Fence, Staging


class SharedBlocks:
    """What HostBlocks is to its streamer, to the streamer of another card; the owner reads, pins and frees.

    Nothing of it may be in use when the owner is refilled, unpinned or released. What the owner could not pin travels
    through a pinned staging pair of this source's own.
    """

    def __init__(self, owner: HostBlocks) -> None:
        self.layouts: tuple[BlockLayout, ...] = owner.layouts
        self.extents: Sequence[Tensor] = owner.extents
        self._owner = owner
        self._staging: Staging | None = None
        self._staged: frozenset[int] = frozenset()
        self._part, self._in_stages = Part.ALL, False

    @property
    def pinned_bytes(self) -> int:
        """Bytes pinned for this source alone."""
        return self._staging.pinned_bytes if self._staging is not None else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held by this source alone."""
        return self._staging.host_bytes if self._staging is not None else 0

    def prepare(self, order: Sequence[int], part: Part, in_stages: bool = False) -> None:
        """As `HostBlocks.prepare`, but that nothing more is pinned."""
        self.pause()
        self._part, self._in_stages = part, in_stages
        unpinned = [index for index in order if not self._owner.is_pinned(index)]
        if self._owner.budget is not None and unpinned:
            self._staging = stage_blocks(self._owner, unpinned, part, in_stages)
            self._staged = frozenset(unpinned if self._staging is not None else ())

    def available(self, index: int, stage: int = 0) -> bool:
        """Whether `pieces` would return at once."""
        if self._staging is None or index not in self._staged:
            return True
        return self._staging.available((index, stage))

    def pieces(self, index: int, stage: int = 0) -> list[tuple[Tensor, int]]:
        """The bytes of a block's stage as (host bytes, offset in the stage) pairs; may wait for staging."""
        start, stop = self.layouts[index].spans(self._part, self._in_stages)[stage]
        if self._staging is None or index not in self._staged:
            return [(self.extents[index][start:stop], 0)]
        return [(self._staging.take((index, stage))[: stop - start], 0)]

    def sent(self, index: int, fence: Fence) -> None:
        """The copies of `pieces(index)` have been issued; `fence` tells when they are done."""
        if self._staging is not None and index in self._staged:
            self._staging.sent(fence)

    def fetch(self, index: int, part: Part, out: Tensor) -> None:
        """Copy a part of a block to `out` and wait for it; for what stays on the device."""
        self._owner.fetch(index, part, out)

    def pause(self) -> None:
        """Stop threads and free staging until the next `prepare`."""
        staging, self._staging, self._staged = self._staging, None, frozenset()
        if staging is not None:
            staging.close()

    def release(self) -> None:
        """Free what is this source's alone; unload the streamer first."""
        self.pause()
