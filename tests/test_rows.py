"""How many rows and queries go together (transformer/rows.py)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.rows import PRODUCT_TILE, QUERY_TILE, even_step, product_step, query_step
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
    assert 0 < step <= most
    assert rounds(count, step, heads, processors) <= rounds(count, even_step(count, most), heads, processors)


def product_rounds(count: int, step: int, width: int, processors: int) -> int:
    """How often all processors compute a tile each, counted part by part."""
    parts = [min(step, count - first) for first in range(0, count, step)]
    tiles = [math.ceil(part / PRODUCT_TILE) * math.ceil(width / PRODUCT_TILE) for part in parts]
    return sum(math.ceil(each / processors) for each in tiles)


@pytest.mark.parametrize(
    ("count", "most", "processors", "step", "spared"),
    [
        (32760, 8704, 132, 8448, 2),  # 66 tiles of rows, 40 of columns: 20 rounds of 132
        (75600, 17408, 132, 16896, 2),
        (75600, 16384, 132, 15616, 2),
        (32760, 8704, 170, 8576, 3),
        (32760, 8704, 128, 8192, 0),
        (7020, 8704, 132, 7168, 0),  # all at once
        (32760, 8704, None, 8192, 0),
    ],
)
def test_products_fill_rounds_of_the_processors(
    count: int, most: int, processors: int | None, step: int, spared: int
) -> None:
    assert product_step(count, most, 5120, processors) == step
    even = even_step(count, most)
    assert product_rounds(count, even, 5120, processors or 1) - product_rounds(count, step, 5120, processors or 1) == (
        spared
    )


@given(
    count=st.integers(1, 200_000),
    most=st.integers(1, 32768),
    width=st.sampled_from([64, 1536, 3072, 5120]),
    processors=st.integers(1, 200),
)
@settings(max_examples=40, deadline=None)
def test_products_have_room_and_no_more_rounds_than_of_even_parts(
    count: int, most: int, width: int, processors: int
) -> None:
    step, even = product_step(count, most, width, processors), even_step(count, most)
    assert 0 < step <= most
    assert product_rounds(count, step, width, processors) <= product_rounds(count, even, width, processors)


def test_chunks_fill_rounds_in_every_span() -> None:
    execution = Execution(torch.bfloat16, token_chunk=8704, query_chunk=16384, head_groups=5, processors=132)
    work = Workspace(execution, Rows(32760, 5120, 13824, 40), META, 0)
    assert [[rows.stop - rows.start for rows in work.chunks(span.start, span.stop)] for span in work.spans()] == (
        [[8448, 7936], [8448, 7928]]
    )
    assert [rows.stop - rows.start for rows in work.chunks_of_samples()] == [8448, 8448, 8448, 7416]


@pytest.mark.parametrize("batch", [1, 2])
def test_spans_have_room_and_cover_every_sample(batch: int) -> None:
    tokens, execution = 75600, Execution(torch.bfloat16, query_chunk=16384, head_groups=5, processors=132)
    work = Workspace(execution, Rows(batch * tokens, 5120, 13824, 40, batch=batch), META, 0)
    spans = list(work.spans())
    assert max(span.stop - span.start for span in spans) == work.query_rows == 12672
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == batch * tokens and any(span.stop == tokens for span in spans)
