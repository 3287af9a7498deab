"""What PyTorch takes for a sum of many rows, by the rule and as it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowvram_video.attention.backend import AttentionWorkspace, KeyMean
from lowvram_video.attention.sage import workspace_on
from lowvram_video.system.processors import ASSUMED_THREADS, threads_of
from lowvram_video.system.reductions import sum_buffer_bytes

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = json.loads((RESULTS / "workspaces_h200_2026-11-30.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("sums", MEASURED["sums"], ids=lambda sums: "x".join(map(str, sums["shape"])))
def test_the_rule_is_what_a_gpu_was_seen_to_take(sums: dict) -> None:
    batch, rows, heads, dim = sums["shape"]
    said = sum_buffer_bytes(rows, batch * heads * dim, MEASURED["threads"])
    # beside it there are counters, and pieces of up to 1 MiB that the allocator does not cut off
    assert said <= sums["bytes"] <= said + (1 << 20)


def test_few_rows_are_summed_without() -> None:
    assert sum_buffer_bytes(63, 128, ASSUMED_THREADS) == sum_buffer_bytes(1020, 5120, ASSUMED_THREADS) == 0


@given(
    rows=st.integers(1, 100_000), heads=st.integers(1, 40), threads=st.sampled_from([28 * 1536, 128 * 1536, 1 << 18])
)
def test_no_more_than_a_rows_share_or_a_full_gpu(rows: int, heads: int, threads: int) -> None:
    """8 bytes for each number at most, and 64 KiB for each block of 128 threads unless rows are very many."""
    said, numbers = sum_buffer_bytes(rows, heads * 128, threads), rows * heads * 128
    full = (threads // 128 + heads) * (1 << 16)
    assert said <= 8 * numbers + heads * (1 << 16)
    assert said <= max(full, numbers // 2 + heads * (1 << 16))


def test_a_smaller_gpu_takes_less() -> None:
    on_small, on_large = (sum_buffer_bytes(27_030, 512, threads) for threads in (28 * 1536, ASSUMED_THREADS))
    assert 0 < on_small < on_large / 4


def test_a_mean_counts_where_it_is_the_largest() -> None:
    plain = AttentionWorkspace(per_query=1.0, per_key=5.0, per_row=1.0)
    sage = workspace_on(ASSUMED_THREADS, copies_k=True)
    assert sage.nbytes(32_760, 32_760, 40, 128) == plain.nbytes(32_760, 32_760, 40, 128)
    few = sage.nbytes(8_192, 27_030, 4, 128)  # a group of four heads: its copy of k, and the mean's sums
    output = 2 * 8_192 * 4 * 128
    assert few == 2 * 27_030 * 512 + sum_buffer_bytes(27_030, 512, ASSUMED_THREADS) - output
    assert few > plain.nbytes(8_192, 27_030, 4, 128) + (50 << 20)


def test_what_is_beside_a_call_is_beside_its_mean() -> None:
    mean = KeyMean(ASSUMED_THREADS, 2.0)
    workspace = AttentionWorkspace(1.0, 5.0, 1.0, mean=mean).beside(4.0, 3.0)
    assert (workspace.per_query, workspace.per_key, workspace.per_row) == (5.0, 8.0, 1.0)
    assert workspace.mean == KeyMean(ASSUMED_THREADS, 5.0)
    assert AttentionWorkspace().beside(1.0, 1.0).mean is None


def test_a_gpu_that_is_not_here_is_a_large_one() -> None:
    assert threads_of(torch.device("cpu")) == ASSUMED_THREADS
