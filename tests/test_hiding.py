"""Groups of heads that hide an exchange: the arithmetic against what cards with clocks take, and the best there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.team.heads import HeadExchange
from lowvram_video.team.hiding import GROUP_SECONDS, MOST_GROUPS, HeadTimes, hiding_sizes, seen_seconds
from lowvram_video.team.link import HostLink, Mark
from lowvram_video.team.spans import even_spans, group_sizes
from lowvram_video.team.team import Team
from torch import Tensor

CPU = torch.device("cpu")
DIM = 4


class Clock(HostLink):
    """A card that tells the time: copies come on one way, one after the other, beside what it computes."""

    def __init__(self, seconds_per_byte: float) -> None:
        self.seconds_per_byte = seconds_per_byte
        self.now = self.free = 0.0  # when compute is, and when the way is

    def offer(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Mark]:
        return tensors, self.now

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        began = max(self.free, self.now, after)
        for own, other in pairs:
            own.copy_(other)
            began += own.nbytes * self.seconds_per_byte
        self.free = began
        return began

    def wait(self, mark: Mark) -> None:
        self.now = max(self.now, mark)


def seen_by_cards(sizes: Sequence[int], times: HeadTimes, num_cards: int) -> float:
    """What one attention takes longer than all heads of a card are attended, by clocks."""
    tokens = 2 * num_cards
    come = 3 * (tokens - 2) * DIM * 4  # bytes of a head's queries, keys and values that others have
    assert times.back == pytest.approx(times.before / 3)
    clocks = [Clock(times.before / come) for _ in range(num_cards)]
    team, spans = Team([CPU] * num_cards, clocks, 20.0), even_spans(tokens, num_cards)

    def layer(rank: int) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
            clocks[rank].now += q.shape[2] * times.attended
            return [q.contiguous()]

        own = torch.zeros(1, 2, num_cards * sum(sizes), DIM)
        HeadExchange(team.exchanges[rank], range(num_cards), spans, (own, own.clone(), own.clone()), sizes).run(attend)

    team.run(layer)
    team.close()
    return max(clock.now for clock in clocks) - sum(sizes) * times.attended


class TestSeconds:
    @settings(max_examples=15, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        slow=st.floats(0.01, 4.0),
        num_cards=st.integers(2, 3),
    )
    def test_they_are_those_of_cards_with_clocks(self, sizes, slow, num_cards):
        """Nothing waits longer than it must: not for what the others have taken of it, either."""
        times = HeadTimes.of(slow, 1.0, 1)
        assert seen_by_cards(sizes, times, num_cards) == pytest.approx(seen_seconds(sizes, times))

    def test_of_one_group_all_is_seen(self):
        assert seen_seconds((20,), HeadTimes.of(8.0, 100.0, 20)) == pytest.approx(8.0)

    def test_what_is_hidden_is_all_but_the_ends(self):
        times = HeadTimes.of(8.0, 100.0, 20)
        assert seen_seconds((2, 6, 6, 4, 2), times) == pytest.approx(8.0 * 2 / 20)


class TestSizes:
    @settings(max_examples=20, deadline=None)
    @given(
        num_heads=st.integers(1, 9),
        exchange=st.floats(1e-4, 1e-1),
        attention=st.floats(1e-4, 1e-1),
        largest=st.integers(1, 9),
    )
    def test_none_take_less_time(self, num_heads, exchange, attention, largest):
        largest = min(largest, num_heads)
        times = HeadTimes.of(exchange, attention, num_heads)

        def seconds(sizes: Sequence[int]) -> float:
            return seen_seconds(sizes, times) + len(sizes) * GROUP_SECONDS

        found = hiding_sizes(num_heads, times, 1 << 14, largest)
        assert sum(found) == num_heads and max(found) <= largest
        every = all_splits(num_heads, lambda sizes: max(sizes) <= largest and len(sizes) <= MOST_GROUPS)
        assert all(seconds(found) <= seconds(sizes) + 1e-12 for sizes in every)

    def test_groups_of_a_short_video_have_heads_enough_to_fill_a_card(self):
        times = HeadTimes.of(1e-3, 2e-2, 20)
        assert min(hiding_sizes(20, times, 32760, 20)) == 1
        assert min(hiding_sizes(20, times, 7800, 20)) * 7800 >= 1 << 14
        assert hiding_sizes(20, times, 100, 20) == (20,)

    def test_where_memory_has_room_for_few_heads_they_go_evenly(self):
        assert hiding_sizes(20, HeadTimes.of(1e-2, 1e-2, 20), 100, 3) == group_sizes(20, 7)


def all_splits(count: int, fits: Callable[[Sequence[int]], bool]) -> list[list[int]]:
    """Of so many things in a row, by where they are cut."""
    cuts = [cut for num in range(count) for cut in combinations(range(1, count), num)]
    every = [[stop - start for start, stop in pairwise([0, *cut, count])] for cut in cuts]
    return [sizes for sizes in every if fits(sizes)]
