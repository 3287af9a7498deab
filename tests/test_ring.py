"""Places in the ring, and who owns it."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.memory.plan.candidates import spread_residents
from lowvram_video.memory.stream.ring import DeviceRing, pair_bytes, plan_ring, ring_bytes

SIZES = st.lists(st.integers(1, 40).map(lambda n: 256 * n), min_size=1, max_size=14)


def clash(plan, j: int, k: int) -> bool:
    return plan.offsets[j] < plan.offsets[k] + plan.sizes[k] and plan.offsets[k] < plan.offsets[j] + plan.sizes[j]


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(0, 50))
def test_places_fit_and_overlaps_are_complete(sizes: list[int], num_slots: int, spare: int) -> None:
    capacity = ring_bytes(sizes, num_slots) + 256 * spare
    plan = plan_ring(sizes, capacity)
    assert all(0 <= at <= capacity - size for at, size in zip(plan.offsets, sizes, strict=True))
    for k in range(len(sizes)):
        assert set(plan.overlaps[k]) == {j for j in range(len(sizes)) if j == k or clash(plan, j, k)}
    # `depth` consecutive blocks never overlap, also across the end of the pass.
    count = len(sizes)
    for first, ahead in itertools.product(range(count), range(1, min(plan.depth, count))):
        assert not clash(plan, first, (first + ahead) % count)
    whole_rounds = count % num_slots == 0
    assert plan.depth >= (min(num_slots, count) if whole_rounds else 1)


@pytest.mark.parametrize(("count", "num_slots"), [(40, 2), (30, 3), (24, 4), (7, 7)])
def test_equal_blocks_use_equal_slots(count: int, num_slots: int) -> None:
    plan = plan_ring([1000] * count, ring_bytes([1000] * count, num_slots))
    assert plan.depth == num_slots and set(plan.offsets) == {1024 * slot for slot in range(num_slots)}


def test_framepack_blocks_of_two_sizes() -> None:
    double, single = 648 << 20, 270 << 20
    sizes = [double] * 20 + [single] * 40
    started = time.perf_counter()
    plan = plan_ring(sizes, ring_bytes(sizes, 2))
    seconds = time.perf_counter() - started
    singles = {plan.offsets[k] for k in range(24, 56)}
    print(f"FramePack: depth {plan.depth}, {len(singles)} places for singles, planned in {seconds * 1e3:.0f} ms")
    assert plan.depth == 2
    assert len(singles) >= 4  # a byte ring holds more of the smaller blocks than two slots would


def test_stages_of_unequal_size_lie_at_the_rings_ends_in_turn() -> None:
    sizes = [100 << 20, 100 << 20, 135 << 20] * 40
    assert pair_bytes(sizes) == 235 << 20 < ring_bytes(sizes, 2)
    assert plan_ring(sizes, pair_bytes(sizes)).depth == 2


@settings(max_examples=100, deadline=None)
@given(SIZES)
def test_a_ring_for_pairs_holds_any_two_that_follow_each_other(sizes: list[int]) -> None:
    plan = plan_ring(sizes, max(pair_bytes(sizes), ring_bytes(sizes, 1)))
    if len(sizes) % 2 == 0:
        assert plan.depth >= 2 or len(sizes) == 1


def test_too_small_a_ring_is_refused_with_the_size_it_needs() -> None:
    with pytest.raises(ValueError, match="largest streamed block has 1024 bytes but the ring only 512"):
        plan_ring([100, 1000], 512)


@given(st.integers(1, 64), st.data())
def test_residents_are_spread_evenly(num_blocks: int, data: st.DataObject) -> None:
    num_resident = data.draw(st.integers(0, num_blocks))
    resident = spread_residents(num_blocks, num_resident)
    assert len(set(resident)) == num_resident and all(0 <= index < num_blocks for index in resident)
    gaps = {b - a for a, b in itertools.pairwise(resident)}
    assert not gaps or max(gaps) - min(gaps) <= 1


class User:
    def __init__(self) -> None:
        self.lost = 0

    def lose_ring(self) -> None:
        self.lost += 1


def test_owner_is_told_and_memory_goes_with_the_last_user() -> None:
    ring = DeviceRing(1000, torch.device("cpu"))
    first, second = User(), User()
    flat = ring.attach(first)
    assert flat.numel() == 1024 and ring.attach(second).data_ptr() == flat.data_ptr()
    for user in (first, first, second, second):
        ring.take(user)
    assert (first.lost, second.lost) == (1, 0)
    ring.detach(second)
    ring.take(first)
    assert second.lost == 0
    ring.detach(first)
    assert ring._flat is None
