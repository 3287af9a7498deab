"""What holds the blocks that stream, in RAM, on other cards or on the disk, and how long they take to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from .footprint import GIB, Limits, ModelFootprint
from .parking import Homes, Parking, ParkPlace, find_homes

MIN_STAGING, MAX_STAGING = 3, 4
STAGING_PAIR = 2  # buffers through which blocks of another card pass where the two do not reach each other
RAM_MARGIN_BYTES = 3 * GIB // 2  # interpreter, libraries and buffers beside the weights


@dataclass(frozen=True)
class HostMemory:
    """What holds the streamed blocks: pinned and pageable bytes, and what RAM holds in all, for all cards, at most.

    `from_disk` means that RAM holds no block: the streamed ones are read again in every pass through `num_staging`
    pinned buffers, which each card has, the residents once. Where blocks are parked `homes` says where each lies, and
    `from_disk` that some are read again in every pass.
    """

    pinned_bytes: int
    pageable_bytes: int
    from_disk: bool
    num_staging: int
    ram_bytes: int
    homes: Homes | None = None


def find_host_memory(
    model: ModelFootprint, sizes: tuple[int, ...], streamed: Sequence[int], limits: Limits, num_cards: int
) -> tuple[HostMemory, float]:
    """Where blocks come from, of which so many bytes of each travel and those `streamed` do; the seconds they take."""
    if limits.parking is not None:
        return _parked(model, sizes, streamed, limits, limits.parking, num_cards)
    return _unparked(model, sizes, tuple(sizes[index] for index in streamed), limits, num_cards)


def bytes_beside_blocks(model: ModelFootprint, limits: Limits, num_cards: int) -> int:
    """RAM for the process, and for what each card has brought in each pass, wherever the blocks are."""
    return RAM_MARGIN_BYTES + (0 if limits.ram_is_the_device else num_cards * model.transient_bytes)


def _unparked(
    model: ModelFootprint, sizes: tuple[int, ...], streamed: tuple[int, ...], limits: Limits, num_cards: int
) -> tuple[HostMemory, float]:
    """In RAM all of them, or none.

    With room for what can be brought in each pass, even where it is not: a leaner plan after an out-of-memory may.
    """
    ram, cap, beside = limits.ram_budget_bytes, limits.pinned_cap_bytes, bytes_beside_blocks(model, limits, num_cards)
    pinned = _pinned_bytes(streamed, cap)
    pageable = sum(streamed) - pinned
    # pageable blocks travel through a pair of pinned buffers, where any may be pinned
    buffers = num_cards * STAGING_PAIR * max(streamed) if pageable and cap else 0
    # all of it: residents stay in RAM too, and so do weights whose keys and values are cached, for the next prompt
    in_ram = model.per_run_bytes + sum(model.block_bytes) + buffers + beside
    if ram is None or in_ram <= ram:
        seconds = pinned / (1e9 * limits.h2d_gbps) + pageable / (1e9 * limits.pageable_gbps)
        return HostMemory(pinned, pageable, False, 0, in_ram), seconds
    num_staging = MAX_STAGING if num_cards * MAX_STAGING * max(sizes) + beside <= ram else MIN_STAGING
    staging = (max(streamed),) * (num_cards * num_staging) if streamed else ()
    pinned = _pinned_bytes(staging, cap)
    seconds = sum(streamed) / (1e9 * min(limits.disk_gbps, limits.h2d_gbps))
    return HostMemory(pinned, sum(staging) - pinned, True, num_staging, sum(staging) + beside), seconds


def _parked(
    model: ModelFootprint,
    sizes: tuple[int, ...],
    streamed: Sequence[int],
    limits: Limits,
    parking: Parking,
    num_cards: int,
) -> tuple[HostMemory, float]:
    """On other cards, then in RAM, then on the disk."""
    beside = bytes_beside_blocks(model, limits, num_cards)
    homes = _homes(model, sizes, streamed, limits, parking, beside, num_cards)
    travelling = frozenset(streamed)
    in_ram = tuple(sizes[index] for index in homes.ram if index in travelling)
    on_disk = tuple(sizes[index] for index in homes.disk if index in travelling)
    parked = [(place, tuple(sizes[index] for index in blocks)) for place, blocks in _places(parking, homes)]
    buffers = (max(on_disk),) * MIN_STAGING if on_disk else ()
    buffers += tuple(max(each) for place, each in parked if place.staged for _ in range(STAGING_PAIR))
    buffers *= num_cards
    pinned = _pinned_bytes((*buffers, *in_ram), limits.pinned_cap_bytes)
    pageable = sum(buffers) + sum(in_ram) - pinned
    slow = min(pageable, sum(in_ram))
    seconds = (sum(in_ram) - slow) / limits.h2d_gbps + slow / limits.pageable_gbps
    seconds += sum(on_disk) / min(limits.disk_gbps, limits.h2d_gbps)
    seconds += sum(sum(each) / place.gbps for place, each in parked)
    at_home = model.home_bytes or model.block_bytes
    ram_bytes = sum(at_home[index] for index in homes.ram) + sum(buffers) + beside
    num_staging = MIN_STAGING if on_disk else 0
    return HostMemory(pinned, pageable, bool(on_disk), num_staging, ram_bytes, homes), seconds / 1e9


def _homes(
    model: ModelFootprint,
    sizes: tuple[int, ...],
    streamed: Sequence[int],
    limits: Limits,
    parking: Parking,
    beside: int,
    num_cards: int,
) -> Homes:
    at_home, ram = model.home_bytes or model.block_bytes, limits.ram_budget_bytes
    room = None if ram is None else ram - beside
    homes = find_homes(at_home, streamed, parking, room)
    if room is not None and set(homes.disk) & set(streamed):  # some of it is for what reads them
        homes = find_homes(at_home, streamed, parking, room - num_cards * MIN_STAGING * max(sizes))
    return homes


def _places(parking: Parking, homes: Homes) -> list[tuple[ParkPlace, tuple[int, ...]]]:
    """The cards that park any blocks, with these."""
    return [(place, blocks) for place, (_, blocks) in zip(parking.cards, homes.cards, strict=True) if blocks]


def _pinned_bytes(streamed: tuple[int, ...], cap: int | None) -> int:
    """Whole blocks, in order, for as long as they stay under the cap."""
    return max(takewhile(lambda total: cap is None or total <= cap, accumulate(streamed)), default=0)
