"""Yields a model's blocks one after the other, each with its weights on the device by the time it computes."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .layout import BlockLayout, LayoutError, Part, bind, unbind
from .ring import DeviceRing, RingSchedule, plan_ring
from .staging import Fence
from .streams import BlockEvents, Streams, streams_for


class BlockSource(Protocol):
    """Where weights come from: HostBlocks or DiskBlocks."""

    @property
    def layouts(self) -> Sequence[BlockLayout]: ...
    @property
    def extents(self) -> Sequence[Tensor] | None: ...
    def prepare(self, order: Sequence[int], part: Part) -> None: ...
    def available(self, index: int) -> bool: ...
    def pieces(self, index: int) -> list[tuple[Tensor, int]]: ...
    def sent(self, index: int, fence: Fence) -> None: ...
    def fetch(self, index: int, part: Part, out: Tensor) -> None: ...
    def pause(self) -> None: ...


class StreamerError(RuntimeError):
    """A streamer was used while unloaded, or a pass was continued after another one had begun."""


class BlockStreamer:
    """Streams blocks through a ring of device bytes while earlier ones compute.

    `blocks` are the model's in the order of a pass; `streamer(some)` iterates over all or some of them. Each streamed
    block always lands at the same address, its parameters are views bound once by `load`, and copies are ordered
    against compute by events: the host never waits in a pass, except for the disk or to feed unpinned memory. After a
    block the next free bytes are filled at once, past the end of the pass with the first blocks of the next. A pass
    that ends early, by an exception or by closing the iterator, leaves everything ready for the next one.

    `resident` blocks stay on the device. `part` streams only the every-pass or only the optional tensors.
    `ring` may be shared between streamers and is not needed if nothing streams; on a CPU with the blocks in
    RAM they are bound where they are. `between_blocks` is called before each block and may raise. One
    streamer belongs to one thread.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        source: BlockSource,
        device: torch.device,
        *,
        ring: DeviceRing | None = None,
        resident: Collection[int] = (),
        part: Part = Part.ALL,
        between_blocks: Callable[[], None] | None = None,
    ) -> None:
        self.between_blocks = between_blocks
        self._blocks = list(blocks)
        self._source = source
        self._device = device
        self._part = part
        if len(self._blocks) != len(source.layouts):
            raise LayoutError(f"the source describes {len(source.layouts)} blocks, the model has {len(self._blocks)}")
        self._index = {id(block): index for index, block in enumerate(self._blocks)}
        self._in_place = device.type == "cpu" and ring is None and source.extents is not None
        self._resident = frozenset(range(len(self._blocks)) if self._in_place else resident)
        self._streamed = [index for index in range(len(self._blocks)) if index not in self._resident]
        if self._streamed and ring is None:
            raise ValueError(f"{len(self._streamed)} of {len(self._blocks)} blocks are streamed: give a ring")
        self._ring = ring
        self._schedule = self._plan(ring)
        self._position = {index: position for position, index in enumerate(self._streamed)}
        self.streams: Streams = ring.streams if ring is not None else streams_for(device)
        self._events: list[BlockEvents] = [self.streams.events(index) for index in range(len(self._blocks))]
        self._memory: list[Tensor] = []  # the residents' bytes
        self._flat: Tensor | None = None  # the ring's bytes
        self._loaded = False
        self._prepared = False  # the source knows what comes next
        self._in_use: int | None = None  # block index
        self._pass: object | None = None  # the open pass
        self._reset()

    def load(self) -> None:
        """Allocate, upload the residents, bind all parameters; calling it again does nothing."""
        if self._loaded:
            return
        try:
            # Tensors made in inference mode could not be written outside it.
            with torch.inference_mode(False):
                self._bind_residents()
                self._bind_streamed()
        except BaseException:
            self.unload()
            raise
        self._loaded = True

    def unload(self) -> None:
        """Wait for the device and free its memory; parameters go back to meta. Calling it again does nothing."""
        self._loaded = False
        try:
            self._close_pass()
            self.streams.synchronize()
        finally:
            self._pause_source()
            for block, layout in zip(self._blocks, self._source.layouts, strict=True):
                unbind(block, layout, self._part)
            self._memory.clear()
            self._flat = None
            if self._ring is not None:
                self._ring.detach(self)
            self._reset()

    def __del__(self) -> None:
        # Prefetched bytes may still be arriving in memory that the allocator would hand to somebody else.
        if getattr(self, "_loaded", False) and not sys.is_finalizing():
            self.unload()

    def lose_ring(self) -> None:
        """Called by the ring when another streamer takes it: what was prefetched is gone."""
        self._close_pass()
        self._pause_source()
        self._reset()

    def __call__(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Yield each block when the compute stream may use it, in order.

        Raises ValueError for a block that is not this streamer's and StreamerError when it is not loaded.
        """
        if not self._loaded:
            raise StreamerError("the blocks are not on the device: call load() first")
        self._close_pass()  # one that was left open: its iterator may live on in some traceback
        token = self._pass = object()
        try:
            self._take_ring()
            for block in blocks:
                if self.between_blocks is not None:
                    self.between_blocks()
                index = self._index_of(block)
                self._acquire(index)
                yield block
                if self._pass is not token:
                    raise StreamerError("another pass has begun since; this one cannot go on")
                self._release()
        finally:
            if self._pass is token:
                self._close_pass()

    # State, in an order of updates that an interrupt cannot turn into a wrong one: a copy is trusted only if
    # `_held` says so, which is set last; bytes are overwritten only if `_in_use` allows, which is set first.

    def _reset(self) -> None:
        count = len(self._streamed)
        self._held = [False] * count  # the ring holds this block's bytes, or they are on their way
        self._used = [False] * count  # its free event was recorded and no copy has waited for it yet
        self._window = 0, 0  # (next position of the pass, how many from there on are held for it)
        self._in_use = None
        self._pass = None

    def _acquire(self, index: int) -> None:
        position = self._position.get(index)
        if position is not None:
            start, ahead = self._window
            if start != position:  # a pass after one that ended early, or a caller that skips blocks
                start, ahead = self._window = position, 0
            if not self._held[position]:
                self._copy(position)
        self._in_use = index
        if position is not None:
            self._window = (position + 1) % len(self._streamed), max(ahead - 1, 0)
        self.streams.wait_ready(self._events[index])

    def _release(self) -> None:
        self._free_in_use()
        self._fill_ring()

    def _close_pass(self) -> None:
        self._pass = None
        self._free_in_use()

    def _free_in_use(self) -> None:
        if self._in_use is None:
            return
        position = self._position.get(self._in_use)
        if position is not None:
            self._used[position] = True
        self.streams.record_free(self._events[self._in_use])
        self._in_use = None

    def _fill_ring(self) -> None:
        count = len(self._streamed)
        while self._window[1] < count:
            start, ahead = self._window
            position = (start + ahead) % count
            if not self._held[position]:
                if self._needed(position) or not self._source.available(self._streamed[position]):
                    return
                self._copy(position)
            self._window = start, ahead + 1

    def _needed(self, position: int) -> bool:
        """Whether bytes of this position's place belong to a block in use or waiting to be used."""
        start, ahead = self._window
        count = len(self._streamed)
        in_use = self._position.get(self._in_use) if self._in_use is not None else None
        return any(other == in_use or (other - start) % count < ahead for other in self._schedule.overlaps[position])

    def _copy(self, position: int) -> None:
        index = self._streamed[position]
        pieces = self._source.pieces(index)
        others = self._schedule.overlaps[position]
        for other in others:
            self._held[other] = False
        region = self._region(position)
        pairs = [(region[at : at + host.numel()], host) for host, at in pieces]
        events = self._events[index]
        # The copy stream keeps its order, so an event that one copy has waited for is past for all later ones.
        after = [self._events[self._streamed[other]] for other in others if self._used[other]]
        self.streams.copy(pairs, after, events)
        for other in others:
            self._used[other] = False
        self._held[position] = True
        self._source.sent(index, events.ready)

    # Set-up

    def _plan(self, ring: DeviceRing | None) -> RingSchedule:
        sizes = [self._source.layouts[index].part_bytes(self._part) for index in self._streamed]
        return plan_ring(sizes, ring.nbytes if ring is not None else 0)

    def _region(self, position: int) -> Tensor:
        assert self._flat is not None
        offset = self._schedule.offsets[position]
        return self._flat[offset : offset + self._schedule.sizes[position]]

    def _bind_residents(self) -> None:
        for index in sorted(self._resident):
            layout = self._source.layouts[index]
            if self._in_place:
                assert self._source.extents is not None
                start, stop = layout.span(self._part)
                flat = self._source.extents[index][start:stop]
            else:
                flat = torch.empty(layout.part_bytes(self._part), dtype=torch.uint8, device=self._device)
                self._source.fetch(index, self._part, flat)
                self._memory.append(flat)
            bind(self._blocks[index], layout, flat, self._part)

    def _bind_streamed(self) -> None:
        if self._ring is None:
            return
        self._flat = self._ring.attach(self)
        for position, index in enumerate(self._streamed):
            bind(self._blocks[index], self._source.layouts[index], self._region(position), self._part)

    def _take_ring(self) -> None:
        if self._ring is None or not self._streamed:
            return
        self._ring.take(self)
        if not self._prepared:
            self._source.prepare(self._streamed, self._part)
            self._prepared = True

    def _pause_source(self) -> None:
        # Another streamer may be using the same source for another part of the blocks.
        if self._prepared:
            self._source.pause()
            self._prepared = False

    def _index_of(self, block: nn.Module) -> int:
        index = self._index.get(id(block))
        if index is None:
            raise ValueError(f"a {type(block).__name__} was to be streamed that is none of the streamer's blocks")
        return index
