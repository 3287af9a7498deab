"""In what groups of heads attention hides what cards exchange for it: arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .spans import group_sizes

MOST_GROUPS = 5
LEAST_QUERIES = 1 << 14  # of a group: fewer leave some of a large card's multiprocessors without
# A further group of heads takes a block so much longer: its hosts' calls, and attention of fewer heads at a time.
GROUP_SECONDS = 3e-4


@dataclass(frozen=True)
class HeadTimes:
    """Seconds that one head of a card takes in a block: on its way before attention, attended, on its way back."""

    before: float
    attended: float
    back: float

    @classmethod
    def of(cls, exchange: float, attention: float, num_heads: int) -> HeadTimes:
        """Of the seconds of so many heads: queries, keys and values come, and one result of their size goes back."""
        return cls(3 / 4 * exchange / num_heads, attention / num_heads, 1 / 4 * exchange / num_heads)


def seen_seconds(sizes: Sequence[int], times: HeadTimes) -> float:
    """What of a block's exchange hides behind nothing, where so many heads of a card go in each group.

    As `HeadExchange` has it: a group comes while the one before it is attended, and the one before that goes back, on
    one way in this order. So the first one's way there and the last one's way back are seen, and what waits for these.
    """
    done, here = 0.0, times.before * sizes[0]  # when attention is, and when what it needs is
    free = here  # when the way is
    for size, following in zip(sizes, [*sizes[1:], 0], strict=True):
        coming = max(free, done) + times.before * following
        done = max(done, here) + times.attended * size
        here, free = coming, max(coming, done) + times.back * size
    return free - times.attended * sum(sizes)


@lru_cache(maxsize=64)
def hiding_sizes(num_heads: int, times: HeadTimes, tokens: int, largest: int) -> tuple[int, ...]:
    """The groups of a card's heads, in their order, that take the least time; none has more than `largest` heads."""
    least = min(-(-LEAST_QUERIES // tokens), largest)
    splits = [sizes for num in range(1, MOST_GROUPS + 1) for sizes in _splits(num_heads, num, least, largest)]
    even = group_sizes(num_heads, -(-num_heads // largest))  # what memory has room for in the fewest groups
    return min([even, *splits], key=lambda sizes: seen_seconds(sizes, times) + len(sizes) * GROUP_SECONDS)


def _splits(count: int, num_parts: int, least: int, largest: int) -> Iterator[tuple[int, ...]]:
    """All ways to have `count` in so many parts in order, of `least` to `largest` each."""
    if num_parts == 1:
        if least <= count <= largest:
            yield (count,)
        return
    for first in range(least, min(largest, count - least * (num_parts - 1)) + 1):
        yield from ((first, *others) for others in _splits(count - first, num_parts - 1, least, largest))
