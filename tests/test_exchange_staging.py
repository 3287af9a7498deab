"""Copies by way of RAM: right in any order that devices may run them in, from a ring that never grows."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.team.staging import NUM_PIECES, PIECE_BYTES, StagedCopies
from torch import Tensor


@dataclass
class Mark:
    passed: bool = False


@dataclass
class Devices:
    """Streams of several cards, each of which runs its copies in order, and none before the marks that it waits for."""

    seed: int
    streams: dict[int, deque[tuple[Callable[[], object], list[Mark], Mark]]] = field(default_factory=dict)
    allocated: list[int] = field(default_factory=list)

    def allocate(self, nbytes: int) -> Tensor:
        self.allocated.append(nbytes)
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def enqueue(self, stream: int, copy: Callable[[], object], after: Sequence[Mark]) -> Mark:
        mark = Mark()
        self.streams.setdefault(stream, deque()).append((copy, list(after), mark))
        return mark

    def run(self) -> None:
        """All that is waiting, in some order."""
        order = random.Random(self.seed)
        while any(self.streams.values()):
            ready = [each for each in self.streams.values() if each and all(mark.passed for mark in each[0][1])]
            copy, _, mark = order.choice(ready).popleft()
            copy()
            mark.passed = True


@dataclass
class LazyLegs:
    """Stream 0 is the card's own; bytes of other cards say by their first one which card they are of."""

    devices: Devices

    def leave(self, piece: Tensor, other: Tensor, after: Sequence[Mark]) -> Mark:
        return self.devices.enqueue(int(other[0]) % 3 + 1, lambda: piece.copy_(other), after)

    def arrive(self, own: Tensor, piece: Tensor, after: Mark) -> Mark:
        return self.devices.enqueue(0, lambda: own.copy_(piece), [after])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    piece=st.integers(1, 16),
    count=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_every_byte_comes_in_any_order_through_a_ring_that_is_allocated_once(sizes, piece, count, seed):
    devices = Devices(seed)
    copies = StagedCopies(LazyLegs(devices), devices.allocate, piece, count)
    sent = [torch.randint(0, 250, (size,), dtype=torch.uint8) for size in sizes]
    made = [torch.zeros_like(each) for each in sent]
    offered = [devices.enqueue(9, lambda: None, []) for _ in sizes]
    ends = [copies.copy([(own, other)], after) for own, other, after in zip(made, sent, offered, strict=True)]
    assert not any(end.passed for end in ends), "the host waited"
    devices.run()
    assert all(own.equal(other) for own, other in zip(made, sent, strict=True)) and all(end.passed for end in ends)
    assert devices.allocated == [piece * count]


def test_a_run_s_exchange_takes_no_more_than_the_ring():
    """31 GB pass through it in one pass of 720x1280x81; each copy's own pinned memory was 18 GiB."""
    devices = Devices(0)
    copies = StagedCopies(LazyLegs(devices), devices.allocate)
    own, other = (torch.zeros(PIECE_BYTES + 5, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(100):
        copies.copy([(own, other)], Mark(True))
    assert devices.allocated == [PIECE_BYTES * NUM_PIECES] and devices.allocated[0] <= 2**27


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_other_dtypes_and_shapes(dtype):
    devices = Devices(3)
    copies = StagedCopies(LazyLegs(devices), devices.allocate, 24, 2)
    other = torch.arange(60).to(dtype).view(3, 4, 5)
    own = torch.empty_like(other)
    copies.copy([(own, other), (own[1], other[1])], Mark(True))
    devices.run()
    assert own.equal(other)


def test_a_ring_of_a_pass_in_inference_mode_serves_others_too():
    devices = Devices(0)
    copies = StagedCopies(LazyLegs(devices), devices.allocate, 8, 2)
    for mode in (True, False):
        with torch.inference_mode(mode):
            own, other = torch.zeros(5), torch.arange(5.0)
            copies.copy([(own, other)], Mark(True))
            devices.run()
            assert own.equal(other)
