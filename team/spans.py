"""Who gets how many of what: arithmetic alone."""

from __future__ import annotations

from itertools import pairwise


def length(span: slice) -> int:
    """How many there are of a slice."""
    return int(span.stop - span.start)


def even_spans(count: int, num_parts: int) -> tuple[slice, ...]:
    """`count` things for so many, as evenly as can be: who gets one more comes first."""
    least, more = divmod(count, num_parts)
    ends = [index * least + min(index, more) for index in range(num_parts + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(ends))


def head_spans(num_heads: int, num_cards: int, num_groups: int) -> list[tuple[slice, ...]]:
    """Of each group of heads, what every card has; a card's heads lie side by side, and no group is empty."""
    cards = even_spans(num_heads, num_cards)
    num_groups = min(num_groups, max(length(span) for span in cards))
    split = [even_spans(length(span), num_groups) for span in cards]
    return [
        tuple(
            slice(card.start + parts[group].start, card.start + parts[group].stop)
            for card, parts in zip(cards, split, strict=True)
        )
        for group in range(num_groups)
    ]


def run_length(group_size: int, num_cards: int) -> int:
    """The runs in which to share out tokens of which so many in a row have one timestep.

    A divisor of the group's size, the largest of which every card can have some; so groups are cut into few.
    """
    least = min(num_cards, group_size)
    return group_size // next(parts for parts in range(least, group_size + 1) if group_size % parts == 0)
