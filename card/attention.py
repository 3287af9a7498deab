"""Attention by every backend that runs on a device, over several lengths: time, rate, and error against fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.backend import AttentionSpec, Backend
from ..attention.probe import disagreement_with_plain
from ..attention.select import Judged
from ..system.card_profile import AttentionRow
from .clock import attempted, median_seconds

HEAD_DIM = 128  # of every model here
TEXT_KEYS = 512  # of cross-attention
CHECKED = 64  # queries of a long call that are compared


@dataclass(frozen=True)
class AttentionSizes:
    """Lengths of self-attention with as many heads as it is measured with, and of queries over a text's keys."""

    lengths: Sequence[tuple[int, int]]
    crossing: Sequence[tuple[int, int]]


# 832x480 of 17, 81 and 1280x720 of 81 frames; few heads where that keeps every core busy, as slow cards take long
SIZES = AttentionSizes(((2048, 24), (8192, 24), (32760, 8), (75600, 8)), ((8192, 24), (32760, 24)))
QUICK_SIZES = AttentionSizes(((8192, 24), (32760, 8)), ((8192, 24),))
CPU_SIZES = AttentionSizes(((256, 4), (1024, 4)), ((1024, 4),))


def measure_attention(judged: Judged, sizes: AttentionSizes, spec: AttentionSpec) -> Iterator[AttentionRow]:
    """One row for each size of a backend, as it is done; one that says why where it cannot run."""
    rows = [AttentionRow(judged.name, heads, length, length) for length, heads in sizes.lengths]
    rows += [AttentionRow(judged.name, heads, length, TEXT_KEYS) for length, heads in sizes.crossing]
    if judged.reason is not None:
        yield replace(rows[0], problem=judged.reason)
        return
    yield from (_measured(judged.backend, row, spec) for row in rows)


def _measured(backend: Backend, row: AttentionRow, spec: AttentionSpec) -> AttentionRow:
    # q, k, v, the result, and as much again for what a backend makes of them; twice: the reference and a mask in fp32
    needed = 10 * row.heads * (row.queries + row.keys) * HEAD_DIM * spec.dtype.itemsize
    found = attempted(lambda: _timed(backend, row, spec), needed, spec.device)
    return replace(row, problem=found) if isinstance(found, str) else found


def _timed(backend: Backend, row: AttentionRow, spec: AttentionSpec) -> AttentionRow:
    generator = torch.Generator(spec.device).manual_seed(0)

    def draw(length: int) -> Tensor:
        shape = (1, length, row.heads, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=spec.device, dtype=spec.dtype)

    q, k, v = draw(row.queries), draw(row.keys), draw(row.keys)
    reason, error = disagreement_with_plain(backend, q, k, v, CHECKED)
    if reason is not None:
        return replace(row, problem=reason)
    seconds = median_seconds(lambda: backend.attend(q, k, v), spec.device)
    flops = 4 * row.heads * row.queries * row.keys * HEAD_DIM
    return replace(
        row,
        milliseconds=round(1e3 * seconds, 4),
        tflops=float(f"{flops / seconds / 1e12:.4g}"),
        relative_error=float(f"{error:.4g}"),
    )
