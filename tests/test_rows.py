"""How many rows and queries go together (system/rounds.py)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.memory.plan.footprint import Choice, WorkSize
from lowvram_video.system.rounds import QUERY_TILE, even_step, most_queries, query_step
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.workspace import Rows, Workspace

META = torch.device("meta")


def rounds(count: int, step: int, heads: int, processors: int) -> int:
    """How often all processors go through the keys, counted part by part."""
    parts = [min(step, count - first) for first in range(0, count, step)]
    return sum(math.ceil(math.ceil(part / QUERY_TILE) * heads / processors) for part in parts)


@pytest.mark.parametrize(("heads", "most"), [(8, 16384), (40, 16384), (8, 8192), (40, 8192)])
def test_queries_fill_rounds_of_the_processors(heads: int, most: int) -> None:
    """75,600 tokens on 132 processors: at most 3.5 % of them idle, where even parts leave up to 12 % idle."""
    ideal = 75600 * heads / QUERY_TILE / 132
    assert rounds(75600, query_step(75600, most, heads, 132), heads, 132) <= 1.035 * ideal
    assert query_step(75600, most, heads, None) == even_step(75600, most)
    assert rounds(75600, even_step(75600, 8192), 8, 132) > 1.11 * ideal * 8 / heads


@given(
    count=st.integers(1, 200_000),
    most=st.integers(1, 32768),
    heads=st.sampled_from([1, 4, 7, 8, 12, 24, 40]),
    processors=st.integers(1, 200),
)
@settings(max_examples=40, deadline=None)
def test_no_more_queries_than_there_is_room_for_and_no_more_rounds_than_even_parts(
    count: int, most: int, heads: int, processors: int
) -> None:
    step = query_step(count, most, heads, processors)
    assert 0 < step <= most_queries(count, most) <= min(count, most)
    assert rounds(count, step, heads, processors) <= rounds(count, even_step(count, most), heads, processors)


def test_a_plan_counts_the_queries_that_there_are() -> None:
    """8,775 tokens at most 8,192 at a time are two parts: of 5,120 at most, wherever a round ends."""
    assert most_queries(8775, 8192) == 5120 and most_queries(75600, 16384) == 16384
    choice, work = Choice(4096, 5, False, 0, True, query_chunk=8192), WorkSize(17, 624, 720)
    assert (work.tokens, choice.query_rows(work), choice.allowed_queries(work)) == (8775, 5120, 8192)
    for processors in (None, 28, 76, 128, 132, 170):
        execution = Execution(torch.bfloat16, query_chunk=8192, head_groups=5, processors=processors)
        assert Workspace(execution, Rows(8775, 5120, 13824, 40), META, 0).query_rows <= 5120


@pytest.mark.parametrize("batch", [1, 2])
def test_spans_have_room_and_cover_every_sample(batch: int) -> None:
    tokens, execution = 75600, Execution(torch.bfloat16, query_chunk=16384, head_groups=5, processors=132)
    work = Workspace(execution, Rows(batch * tokens, 5120, 13824, 40, batch=batch), META, 0)
    spans = list(work.spans())
    assert max(span.stop - span.start for span in spans) == work.query_rows == 12672
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == batch * tokens and any(span.stop == tokens for span in spans)
