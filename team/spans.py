"""Who gets how many of what: arithmetic alone."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise


def length(span: slice) -> int:
    """How many there are of a slice."""
    return int(span.stop - span.start)


def even_spans(count: int, num_parts: int) -> tuple[slice, ...]:
    """`count` things for so many, as evenly as can be: who gets one more comes first."""
    least, more = divmod(count, num_parts)
    ends = [index * least + min(index, more) for index in range(num_parts + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(ends))


def group_sizes(num_heads: int, num_groups: int) -> tuple[int, ...]:
    """Heads in about as many groups, as even as can be; none is empty."""
    return tuple(length(span) for span in even_spans(num_heads, min(num_groups, num_heads)))


@lru_cache(maxsize=64)
def head_spans(num_heads: int, num_cards: int, sizes: tuple[int, ...]) -> tuple[tuple[slice, ...], ...]:
    """Of each group of heads, what every card has; a card's heads lie side by side.

    `sizes` are the groups of a card with the most heads: one that has a head less has it less in the largest group.
    """
    cards = even_spans(num_heads, num_cards)
    assert sum(sizes) == length(cards[0]) and min(sizes) > 0
    fewer = list(sizes)
    fewer[fewer.index(max(fewer))] -= 1
    ends = [list(accumulate(sizes if length(card) == sum(sizes) else fewer, initial=card.start)) for card in cards]
    return tuple(tuple(slice(*each[group : group + 2]) for each in ends) for group in range(len(sizes)))


def run_length(group_size: int, num_cards: int) -> int:
    """The runs in which to share out tokens of which so many in a row have one timestep.

    A divisor of the group's size, the largest of which every card can have some; so groups are cut into few.
    """
    least = min(num_cards, group_size)
    return group_size // next(parts for parts in range(least, group_size + 1) if group_size % parts == 0)
