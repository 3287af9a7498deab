"""The error of sparse attention that a run's samples measure, beside the true one of all rows and heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lowvram_video.attention.backend import BlockChoice, SparseBackend
from lowvram_video.attention.probe import relative_error
from lowvram_video.attention.sparse.samples import Samples, compare
from torch import Tensor


def error_row(
    kernel: SparseBackend, qkv: tuple[Tensor, Tensor, Tensor], dense: Tensor, blocks: BlockChoice, num_steps: int
) -> dict[str, Any]:
    """Of one call on `[1, L, H, D]`, whose dense answer is `dense`: both errors and the share of blocks.

    As many steps look at other samples of it.
    """
    q, k, v = qkv
    out = kernel.attend(q, k, v, blocks)
    look = partial(compare, q[0], k[0], v[0], out[0])
    sums = torch.stack([look(Samples(q.device, step), blocks) for step in range(num_steps)]).sum(0)
    difference, norm, density = sums.tolist()
    return {
        "tokens": q.shape[1],
        "blocks": named(blocks),
        "true": relative_error(out, dense),
        "measured": (difference / norm) ** 0.5,
        "density": density / num_steps,
    }


def named(blocks: BlockChoice) -> str:
    """A choice in words."""
    if blocks.sinks != (0, 0):
        return "all sinks"
    return f"top-k {blocks.top_k:g}" if blocks.top_k else f"tau {blocks.tau:g}"


def line(row: dict[str, Any]) -> str:
    """A row of a table."""
    return (
        f"{row['tokens']:>8} tokens, {row['blocks']:<12} true {row['true']:.4f}  measured {row['measured']:.4f}  "
        f"({100 * (row['measured'] / row['true'] - 1):+.1f} %)  density {row['density']:.3f}"
    )


def planted(length: int, heads: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[1, length, heads, 128]` of tokens that attend what is alike: 64 directions, 200 tokens of each."""
    generator = torch.Generator(device).manual_seed(length)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    groups = torch.arange(length, device=device) // 200 % 64
    centres = randn(64, heads, 128)
    q, k, v = ((0.6 * centres[groups] + randn(length, heads, 128))[None].to(dtype) for _ in range(3))
    return q, k, v
