"""Where streamed blocks lie at home: in other cards' memory, in RAM, or on the disk; arithmetic alone.

A list such as `cuda:1,8gb;cpu,*` is written as DisTorch2's users write it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...system.sizes import GIB

UNITS = {"gb": GIB, "g": GIB, "mb": 2**20, "m": 2**20, "kb": 2**10, "k": 2**10, "b": 1}  # as DisTorch2 counts them
RAM, DISK = "cpu", "disk"
LARGEST_BYTES = 2**50
EXAMPLE = "write places and amounts such as cuda:1,8gb;cpu,* (gb, mb, a percentage of the blocks such as 40%, or *)"

_PLACE = re.compile(r"disk|(cpu|cuda)(:\d{1,3})?")
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{0,9})?|\.\d{1,9})\s*(%|gb|g|mb|m|kb|k|b)", re.ASCII)


@dataclass(frozen=True)
class Amount:
    """At most so many bytes of the blocks, such a share of them, or both."""

    num_bytes: int = LARGEST_BYTES
    share: float = 1.0

    def of(self, total_bytes: int) -> int:
        """Bytes, of blocks that have so many in all."""
        return min(self.num_bytes, math.ceil(self.share * total_bytes))


@dataclass(frozen=True)
class ParkSpec:
    """A list of places, in which blocks are put in this order, as it was written."""

    places: tuple[tuple[str, Amount], ...]

    @property
    def cards(self) -> tuple[str, ...]:
        """The names of all places but RAM and the disk."""
        return tuple(name for name, _ in self.places if name not in (RAM, DISK))

    def amount(self, name: str) -> Amount | None:
        """What a place may have; None where the list does not name it."""
        return next((amount for place, amount in self.places if place == name), None)


def parse_parking(text: str) -> ParkSpec:
    """The places of a list; ValueError, with the part that is wrong, for what is none."""
    places: list[tuple[str, Amount]] = []
    for entry in text.strip().removesuffix(";").split(";"):
        name, comma, amount = (part.strip() for part in entry.lower().partition(","))
        if not comma or not _PLACE.fullmatch(name):
            raise ValueError(f"parking {text!r}: {entry.strip()!r} is no place with an amount; {EXAMPLE}")
        name = "cuda:0" if name == "cuda" else name
        if name in dict(places):
            raise ValueError(f"parking {text!r}: {name} is there twice; name every place once")
        places.append((name, _amount(text, amount)))
    shares = sum(amount.share for _, amount in places if amount.share < 1)
    if shares > 1 + 1e-9:
        raise ValueError(f"parking {text!r}: the percentages are {100 * shares:g} in all; 100 is everything")
    return ParkSpec(tuple(places))


def _amount(text: str, amount: str) -> Amount:
    if amount == "*":
        return Amount()
    found = _AMOUNT.fullmatch(amount)
    if found is None:
        raise ValueError(f"parking {text!r}: {amount!r} is no amount; {EXAMPLE}")
    number = float(found[1])
    if found[2] == "%":
        if not 0 < number <= 100:
            raise ValueError(f"parking {text!r}: {amount} is no share; use more than 0 and at most 100 %")
        return Amount(share=number / 100)
    num_bytes = number * UNITS[found[2]]
    if not 1 <= num_bytes <= LARGEST_BYTES:
        raise ValueError(f"parking {text!r}: {amount} is no amount of memory; {EXAMPLE}")
    return Amount(int(num_bytes))


@dataclass(frozen=True)
class ParkPlace:
    """Another card: what it may have, what is free there, and how fast blocks come from it, through RAM or not."""

    name: str
    amount: Amount
    free_bytes: int
    gbps: float
    staged: bool = False


@dataclass(frozen=True)
class Parking:
    """The places of a run: `cards` in their order, what RAM may have, and what at most stays where it is computed."""

    cards: tuple[ParkPlace, ...]
    ram: Amount = Amount()
    stay: Amount = Amount()

    def most_resident(self, block_bytes: Sequence[int]) -> int:
        """So many blocks may stay on the device that computes."""
        total = sum(block_bytes)
        return len(block_bytes) if self.stay.of(total) >= total else self.stay.of(total) // max(block_bytes)


@dataclass(frozen=True)
class Homes:
    """Blocks by their numbers: those that each card parks, those in RAM, and those that are read from the disk."""

    cards: tuple[tuple[str, tuple[int, ...]], ...]
    ram: tuple[int, ...]
    disk: tuple[int, ...]


def find_homes(sizes: Sequence[int], streamed: Sequence[int], parking: Parking, ram_bytes: int | None) -> Homes:
    """Homes for blocks of these sizes, of which those `streamed` matter most; `ram_bytes` of RAM are there for them.

    Blocks are parked evenly among the others, so that those that arrive fast and slow take turns.
    """
    total, left = sum(sizes), list(streamed)
    cards = []
    for place in parking.cards:
        room = min(place.free_bytes, place.amount.of(total))
        parked = _spread(left, sizes, room)
        left = [index for index in left if index not in set(parked)]
        cards.append((place.name, parked))
    room = parking.ram.of(total) if ram_bytes is None else min(ram_bytes, parking.ram.of(total))
    settled = {*left, *(index for _, parked in cards for index in parked)}
    ram: list[int] = []
    disk: list[int] = []
    for index in [*left, *(index for index in range(len(sizes)) if index not in settled)]:
        fits = sizes[index] <= room
        room -= sizes[index] if fits else 0
        (ram if fits else disk).append(index)
    return Homes(tuple(cards), tuple(sorted(ram)), tuple(sorted(disk)))


def _spread(blocks: Sequence[int], sizes: Sequence[int], room: int) -> tuple[int, ...]:
    """As many of the blocks as fit, evenly among them."""
    for count in range(len(blocks), 0, -1):
        steps = [index * count // len(blocks) for index in range(len(blocks) + 1)]
        chosen = [block for block, (before, after) in zip(blocks, pairwise(steps), strict=True) if after > before]
        if sum(sizes[index] for index in chosen) <= room:
            return tuple(chosen)
    return ()
