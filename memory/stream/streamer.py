"""Yields a model's blocks one after the other, each with its weights on the device by the time it computes."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .layout import BlockLayout, LayoutError, Part, bind, bind_span, unbind
from .ring import DeviceRing, RingSchedule, plan_ring
from .staging import Fence
from .streams import BlockEvents, Streams, streams_for


class BlockSource(Protocol):
    """Where weights come from: RAM, the disk, another card, or some from each."""

    @property
    def layouts(self) -> Sequence[BlockLayout]: ...
    @property
    def extents(self) -> Sequence[Tensor] | None: ...
    def prepare(self, order: Sequence[int], part: Part, in_stages: bool = False) -> None: ...
    def available(self, index: int, stage: int = 0) -> bool: ...
    def pieces(self, index: int, stage: int = 0) -> list[tuple[Tensor, int]]: ...
    def sent(self, index: int, fence: Fence) -> None: ...
    def fetch(self, index: int, part: Part, out: Tensor) -> None: ...
    def pause(self) -> None: ...


class Unit(NamedTuple):
    """What is copied at a time: a stage of a block (see `BlockLayout`), or all of it as its stage 0."""

    block: int
    stage: int


class StreamerError(RuntimeError):
    """A streamer was used while unloaded, or a pass was continued after another one had begun."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


class BlockStreamer:
    """Streams blocks through a ring of device bytes while earlier ones compute.

    `blocks` are the model's in the order of a pass; `streamer(some)` iterates over all or some of them. Each streamed
    block always lands at the same address, its parameters are views bound once by `load`, and copies are ordered
    against compute by events: the host never waits in a pass, except for the disk or to feed unpinned memory. After a
    block the next free bytes are filled at once, past the end of the pass with the first blocks of the next. A pass
    that ends early, by an exception or by closing the iterator, leaves everything ready for the next one.

    `resident` blocks stay on the device. `part` streams only the every-pass or only the optional tensors.
    `in_stages`: of a block that has stages the ring holds one at a time; the iteration yields it with its first, and
    before it computes with another it must ask for that (`arrive`).
    `ring` may be shared between streamers and is not needed if nothing streams; on a CPU with the blocks in
    RAM they are bound where they are. `between_blocks` is called before each block and may raise. One
    streamer belongs to one thread at a time: that of its card, or another while that one waits (`team/lockstep.py`).
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
        in_stages: bool = False,
        between_blocks: Callable[[], None] | None = None,
    ) -> None:
        self.between_blocks = between_blocks
        self._blocks = list(blocks)
        self._source = source
        self._device = device
        self._part, self._in_stages = part, in_stages
        if len(self._blocks) != len(source.layouts):
            raise LayoutError(f"the source describes {len(source.layouts)} blocks, the model has {len(self._blocks)}")
        self._index = {id(block): index for index, block in enumerate(self._blocks)}
        self._in_place = device.type == "cpu" and ring is None and source.extents is not None
        self._resident = frozenset(range(len(self._blocks)) if self._in_place else resident)
        self._streamed = [index for index in range(len(self._blocks)) if index not in self._resident]
        if self._streamed and ring is None:
            raise ValueError(f"{len(self._streamed)} of {len(self._blocks)} blocks are streamed: give a ring")
        self._units = [Unit(index, stage) for index in self._streamed for stage in range(len(self._spans(index)))]
        self._ring = ring
        self._schedule = self._plan(ring)
        self._overlaps = [frozenset(others) for others in self._schedule.overlaps]
        self._position = {unit: position for position, unit in enumerate(self._units)}
        self.streams: Streams = ring.streams if ring is not None else streams_for(device)
        units = [*self._units, *(Unit(index, 0) for index in self._resident)]
        self._events: dict[Unit, BlockEvents] = {
            unit: self.streams.events(place) for place, unit in enumerate(sorted(units))
        }
        self._memory: list[Tensor] = []  # the residents' bytes
        self._regions: list[Tensor] = []  # the ring's bytes of each position
        self._loaded = False
        self._prepared = False  # the source knows what comes next
        self._in_use: Unit | None = None
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
            self._regions = []
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
                self._acquire(Unit(self._index_of(block), 0))
                yield block
                if self._pass is not token:
                    raise StreamerError("another pass has begun since; this one cannot go on")
                self._release()
        finally:
            if self._pass is token:
                self._close_pass()

    def arrive(self, block: nn.Module, stage: int) -> None:
        """The block that is in use goes on with another of its stages, usually the next: its weights are there then.

        Nothing to do where the whole block is there. Raises as the iteration does.
        """
        unit = Unit(self._index_of(block), stage)
        if self._in_use is None or self._in_use.block != unit.block:
            raise StreamerError(f"block {unit.block} asks for its stage {stage}, but it is not in use")
        if unit != self._in_use and unit in self._position:
            self._release()
            self._acquire(unit)

    def places_of(self, blocks: Collection[int]) -> frozenset[int]:
        """The places in a pass of these blocks and their stages: those of timed streams' spans."""
        return frozenset(events.place for unit, events in self._events.items() if unit.block in blocks)

    # State, in an order of updates that an interrupt cannot turn into a wrong one: a copy is trusted only if
    # `_held` says so, which is set last; bytes are overwritten only if `_in_use` allows, which is set first.

    def _reset(self) -> None:
        count = len(self._units)
        self._held = [False] * count  # the ring holds this block's bytes, or they are on their way
        self._used = [False] * count  # its free event was recorded and no copy has waited for it yet
        self._window = 0, 0  # (next position of the pass, how many from there on are held for it)
        self._in_use = None
        self._pass = None

    def _acquire(self, unit: Unit) -> None:
        position = self._position.get(unit)
        if position is not None:
            start, ahead = self._window
            if start != position:  # a pass after one that ended early, or a caller that skips blocks
                start, ahead = self._window = position, 0
            if not self._held[position]:
                self._copy(position)
        self._in_use = unit
        if position is not None:
            self._window = (position + 1) % len(self._units), max(ahead - 1, 0)
        self.streams.wait_ready(self._events[unit])

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
        count = len(self._units)
        while self._window[1] < count:
            start, ahead = self._window
            position = (start + ahead) % count
            if not self._held[position]:
                if self._needed(position) or not self._source.available(*self._units[position]):
                    return
                self._copy(position)
            self._window = start, ahead + 1

    def _needed(self, position: int) -> bool:
        """Whether bytes of this position's place belong to a block in use or waiting to be used."""
        start, ahead = self._window
        count = len(self._units)
        in_use = self._position.get(self._in_use) if self._in_use is not None else None
        waiting = [other % count for other in range(start, start + ahead)]  # few: where two fit, half of all overlap
        overlaps = self._overlaps[position]
        return in_use in overlaps or not overlaps.isdisjoint(waiting)

    def _copy(self, position: int) -> None:
        unit = self._units[position]
        pieces = self._source.pieces(*unit)
        others = self._schedule.overlaps[position]
        for other in others:
            self._held[other] = False
        region = self._regions[position]
        pairs = [(region.narrow(0, at, host.numel()), host) for host, at in pieces]
        events = self._events[unit]
        # The copy stream keeps its order, so an event that one copy has waited for is past for all later ones.
        after = [self._events[self._units[other]] for other in others if self._used[other]]
        self.streams.copy(pairs, after, events)
        for other in others:
            self._used[other] = False
        self._held[position] = True
        self._source.sent(unit.block, events.ready)

    # Set-up

    def _plan(self, ring: DeviceRing | None) -> RingSchedule:
        sizes = [stop - start for start, stop in map(self._span, self._units)]
        return plan_ring(sizes, ring.nbytes if ring is not None else 0)

    def _spans(self, index: int) -> tuple[tuple[int, int], ...]:
        return self._source.layouts[index].spans(self._part, self._in_stages)

    def _span(self, unit: Unit) -> tuple[int, int]:
        """First byte and end in the block's extent."""
        return self._spans(unit.block)[unit.stage]

    def _bind_residents(self) -> None:
        residents = sorted(self._resident)
        sizes = [self._source.layouts[index].part_bytes(self._part) for index in residents]
        if not self._in_place:  # all in one: the allocator rounds each allocation up
            memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            self._memory = list(memory.split(sizes))
        for position, index in enumerate(residents):
            layout = self._source.layouts[index]
            if self._in_place:
                assert self._source.extents is not None
                start, stop = layout.span(self._part)
                flat = self._source.extents[index][start:stop]
            else:
                flat = self._memory[position]
                self._source.fetch(index, self._part, flat)
            bind(self._blocks[index], layout, flat, self._part)

    def _bind_streamed(self) -> None:
        if self._ring is None:
            return
        flat, places = self._ring.attach(self), zip(self._schedule.offsets, self._schedule.sizes, strict=True)
        self._regions = [flat[offset : offset + size] for offset, size in places]
        for unit, region in zip(self._units, self._regions, strict=True):
            layout = self._source.layouts[unit.block]
            bind_span(self._blocks[unit.block], layout, region, *self._span(unit))

    def _take_ring(self) -> None:
        if self._ring is None or not self._streamed:
            return
        self._ring.take(self)
        if not self._prepared:
            self._source.prepare(self._streamed, self._part, self._in_stages)
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
