"""What a streamer takes from blocks that lie in host memory, whoever read and pinned them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .layout import BlockLayout, Part
from .pinned import PinnedBudget
from .staging import Fence, Job, Key, Staging

STAGING_BUFFERS = 2
STAGING_CHUNK = 32 << 20  # bytes that one thread copies at a time


class HostExtents:
    """Blocks as flat bytes in RAM; those that are not pinned may travel through a pinned staging pair.

    Which do is for `prepare` of the classes below to say.
    """

    _num_threads = 8  # of the pair's

    def __init__(self, layouts: Sequence[BlockLayout], extents: list[Tensor]) -> None:
        self.layouts: tuple[BlockLayout, ...] = tuple(layouts)
        self.extents = extents  # per block [nbytes] uint8
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
        start, stop = self.layouts[index].span(part)
        out.copy_(self.extents[index][start:stop])

    def _stage(self, order: Sequence[int], part: Part, in_stages: bool, budget: PinnedBudget | None) -> None:
        """Have this part of blocks `order`, which are not pinned, go through a pair that reads ahead, if one is pinned.

        Of all others it is copied from where it lies.
        """
        self.pause()
        self._part, self._in_stages = part, in_stages
        if budget is None or not order:
            return
        parts = {
            (index, stage): self.extents[index][start:stop]
            for index in order
            for stage, (start, stop) in enumerate(self.layouts[index].spans(part, in_stages))
        }
        nbytes = max(extent.numel() for extent in parts.values())
        staging = Staging(list(parts), nbytes, partial(_fill, parts), budget, STAGING_BUFFERS, self._num_threads)
        if staging.refusal is not None:
            # Through unpinned staging every byte would be copied once more for nothing.
            staging.close()
            return
        staging.start()
        self._staging, self._staged = staging, frozenset(order)

    def pause(self) -> None:
        """Stop threads and free staging until the next `prepare`."""
        staging, self._staging, self._staged = self._staging, None, frozenset()
        if staging is not None:
            staging.close()

    def release(self) -> None:
        """Free what is this source's alone; unload the streamer first."""
        self.pause()


def _fill(parts: dict[Key, Tensor], key: Key, buffer: Tensor) -> list[Job]:
    part = parts[key]
    pairs = zip(buffer[: part.numel()].split(STAGING_CHUNK), part.split(STAGING_CHUNK), strict=True)
    return [partial(out.copy_, host) for out, host in pairs]
