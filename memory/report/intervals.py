"""Sets of time intervals: union, difference, intersection, total length."""

from __future__ import annotations

from collections.abc import Sequence

Interval = tuple[float, float]  # (start, end); one clock for all of a report, in seconds


def merge(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals as sorted disjoint ones; empty ones vanish."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def intersect(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Where both unions are."""
    return subtract(a, subtract(a, b))


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Where the union of `a` is and that of `b` is not."""
    left: list[Interval] = []
    holes = merge(b)
    first = 0
    for start, end in merge(a):
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        index = first
        while index < len(holes) and holes[index][0] < end:
            left.append((start, holes[index][0]))
            start = holes[index][1]
            index += 1
        left.append((start, end))
    return merge(left)


def length(intervals: Sequence[Interval]) -> float:
    """Total length of the union."""
    return sum(end - start for start, end in merge(intervals))


def split(intervals: Sequence[Interval], at: float) -> tuple[list[Interval], list[Interval]]:
    """What lies before a moment and what lies after it; an interval across it has a part in both."""
    before = [(start, min(end, at)) for start, end in intervals if start < at]
    return before, [(max(start, at), end) for start, end in intervals if end > at]
