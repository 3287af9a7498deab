"""One allocation of device bytes through which all streamed blocks pass, each always at the same address."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .layout import align
from .streams import BlockEvents, Streams, streams_for


class RingUser(Protocol):
    """A streamer, as its ring sees it."""

    def lose_ring(self) -> None:
        """Another user takes the ring: end an open pass; what was prefetched is gone."""


@dataclass(frozen=True)
class RingSchedule:
    """Static places of the streamed blocks, by their position in the pass."""

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    overlaps: tuple[tuple[int, ...], ...]  # positions that share bytes with this one, itself included
    depth: int  # so many consecutive blocks (also across the end of the pass) never share bytes


def ring_bytes(sizes: Sequence[int], num_slots: int) -> int:
    """Bytes for a ring in which `num_slots` consecutive blocks always lie side by side."""
    return min(num_slots, len(sizes)) * max((align(size) for size in sizes), default=0)


def pair_bytes(sizes: Sequence[int]) -> int:
    """Bytes for a ring in which any two consecutive blocks, the last and the first too, lie side by side."""
    aligned = [align(size) for size in sizes]
    return max((size + after for size, after in zip(aligned, [*aligned[1:], *aligned[:1]], strict=True)), default=0)


def plan_ring(sizes: Sequence[int], capacity: int) -> RingSchedule:
    """Place blocks of `sizes` bytes, in pass order, in a ring of `capacity` bytes.

    Every block gets the place that was used longest ago and will be needed latest. Where that ends in fragments, equal
    slots are used instead, or the ring's two ends in turn. Either is only a matter of speed: the streamer makes every
    copy wait for all blocks that overlap it. Raises ValueError when the largest block does not fit.
    """
    sizes = tuple(align(size) for size in sizes)
    largest = max(sizes, default=0)
    if largest > capacity:
        raise ValueError(
            f"the largest streamed block has {largest} bytes but the ring only {capacity}; "
            f"give the ring at least {largest} bytes, {2 * largest} to overlap copies with compute"
        )
    plans = [_schedule(sizes, _fit_offsets(sizes, capacity))]
    # More slots are not always better: with 3 for 4 blocks the pass would end in the slot where it begins.
    for num_slots in range(2, min(capacity // max(largest, 1), len(sizes)) + 1):
        plans.append(_schedule(sizes, tuple(k % num_slots * largest for k in range(len(sizes)))))
    plans.append(_schedule(sizes, tuple(k % 2 * (capacity - size) for k, size in enumerate(sizes))))
    return max(plans, key=lambda plan: plan.depth)


class DeviceRing:
    """The ring's memory and its streams; several streamers may share one, a single one owns it at a time."""

    def __init__(self, nbytes: int, device: torch.device, streams: Streams | None = None) -> None:
        self.nbytes = align(nbytes)
        self.device = device
        self.streams = streams_for(device) if streams is None else streams
        self._flat: Tensor | None = None
        self._users: weakref.WeakSet[RingUser] = weakref.WeakSet()
        self._owner: weakref.ref[RingUser] | None = None
        self._handover: BlockEvents = self.streams.events(-1)
        self._settled = True  # False: an interrupt cut a handover off

    def attach(self, user: RingUser) -> Tensor:
        """The ring's bytes ([nbytes] uint8), allocated for the first user."""
        if self._flat is None:
            self._flat = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        self._users.add(user)
        return self._flat

    def detach(self, user: RingUser) -> None:
        """Forget a user; the memory goes with the last one. The caller has waited for its streams."""
        self._users.discard(user)
        if self._owner is not None and self._owner() in (user, None):
            self._owner = None
        if not self._users:
            self._flat = None

    def take(self, user: RingUser) -> None:
        """Make `user` the owner; the last one is told, and copies will wait for its blocks."""
        owner = self._owner() if self._owner is not None else None
        if owner is user and self._settled:
            return
        self._settled = False
        if owner is not None and owner is not user:
            owner.lose_ring()
        # One event covers all that the compute stream has been given so far: the last owner's blocks, and
        # whatever used this memory before it was the ring's.
        self.streams.record_free(self._handover)
        self.streams.after_compute(self._handover)
        self._owner = weakref.ref(user)
        self._settled = True


def _fit_offsets(sizes: tuple[int, ...], capacity: int) -> tuple[int, ...]:
    offsets: list[int] = []
    for position, size in enumerate(sizes):
        candidates = {0, *(offset + sizes[j] for j, offset in enumerate(offsets))}
        fitting = sorted(offset for offset in candidates if offset + size <= capacity)
        offsets.append(max(fitting, key=lambda at: _reuse_distance(sizes, offsets, position, at)))
    return tuple(offsets)


def _reuse_distance(sizes: tuple[int, ...], offsets: list[int], position: int, at: int) -> int:
    """Blocks between this use of the bytes and the nearest other one, before it or in the next pass."""
    count = len(sizes)
    distances = [
        min(position - j, j + count - position)
        for j, offset in enumerate(offsets)
        if offset < at + sizes[position] and at < offset + sizes[j]
    ]
    return min(distances, default=count)


def _schedule(sizes: tuple[int, ...], offsets: tuple[int, ...]) -> RingSchedule:
    count = len(sizes)
    overlaps = tuple(
        tuple(
            j
            for j in range(count)
            if j == k or (offsets[j] < offsets[k] + sizes[k] and offsets[k] < offsets[j] + sizes[j])
        )
        for k in range(count)
    )
    distances = [min(abs(k - j), count - abs(k - j)) for k, others in enumerate(overlaps) for j in others if j != k]
    return RingSchedule(sizes, offsets, overlaps, min(distances, default=count))
