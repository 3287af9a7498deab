"""The rows of `several_cards.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line: `size` is (width, height, frames)."""

    name: str
    size: tuple[int, int, int]
    wanted: float  # times as fast on two cards
    samples: int = 1  # 2: guided
    staged: bool = False
    rounds: int = 3
    framepack: bool = False
    parked: bool = False  # one card, whose blocks lie in another's memory (with --twice: in its own as in another's)
    beside: bool = False  # parked, and several cards share the pass: none of them has the blocks where there are more
    sparse: bool = False
    nag: bool = False
    packed: bool = False


ROWS = (
    Row("clip", (832, 480, 17), 1.2, rounds=5),
    Row("480p", (832, 480, 81), 1.85),
    Row("720p", (1280, 720, 81), 1.92, rounds=1),
    Row("480p staged", (832, 480, 81), 1.5, staged=True),
    Row("720p staged", (1280, 720, 81), 1.75, staged=True, rounds=1),
    Row("clip staged", (832, 480, 17), 0, staged=True, rounds=5),
    Row("FramePack section", (640, 608, 33), 1.7, rounds=5, framepack=True),
    Row("clip guided", (832, 480, 17), 0, samples=2, rounds=5),
    Row("480p guided", (832, 480, 81), 1.95, samples=2, rounds=1),
    Row("480p parked", (832, 480, 81), 1 / 1.03, parked=True),
    Row("480p sparse", (832, 480, 81), 0, sparse=True),
    Row("clip NAG", (832, 480, 17), 0, rounds=5, nag=True),
    Row("480p staged packed", (832, 480, 81), 0, staged=True, packed=True),
)
TWICE_BLOCKS = 10
TWICE_ROWS = (
    Row("clip twice", (832, 480, 17), 0, rounds=9),
    Row("clip twice staged", (832, 480, 17), 0, staged=True, rounds=9),
    Row("clip twice guided", (832, 480, 17), 0, samples=2, rounds=9),
    Row("480p twice", (832, 480, 81), 0, rounds=2),
    Row("480p parked", (832, 480, 81), 0, rounds=2, parked=True),
    Row("clip twice NAG", (832, 480, 17), 0, rounds=3, nag=True),
    Row("clip twice packed", (832, 480, 17), 0, rounds=3, packed=True),
    Row("clip twice sparse", (832, 480, 17), 0, rounds=3, sparse=True),
    Row("clip twice parked beside", (832, 480, 17), 0, rounds=3, parked=True, beside=True),
    Row("480p twice sparse staged", (832, 480, 81), 0, rounds=2, sparse=True, staged=True),
)
TINY_ROWS = (
    Row("tiny", (96, 64, 9), 0, rounds=2),
    Row("tiny guided", (96, 64, 9), 0, samples=2, rounds=2),
    Row("tiny FramePack", (128, 96, 33), 0, rounds=2, framepack=True),
    Row("tiny parked", (96, 64, 9), 0, rounds=2, parked=True),
    Row("tiny parked beside", (96, 64, 9), 0, rounds=2, parked=True, beside=True),
    Row("tiny NAG", (96, 64, 9), 0, rounds=2, nag=True),
    Row("tiny packed", (96, 64, 9), 0, rounds=2, packed=True),
    Row("tiny sparse", (96, 64, 9), 0, rounds=2, sparse=True),
)
