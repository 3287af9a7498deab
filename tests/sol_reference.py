"""Sol attention in plain PyTorch by its definition (arXiv 2607.24027), query by query, for tests; and its package."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
LOG2E = 1.4426950408889634


def chosen(q: Tensor, k: Tensor, blocks: dict[str, Any]) -> Tensor:
    """Which blocks of keys each block of queries attends exactly, `[B, H, N, N]`, of q and k in float64."""
    scale = LOG2E / q.shape[-1] ** 0.5
    queries = torch.stack([part.mean(1) for part in q.split(BLOCK, 1)], 2)  # [B, H, N, D]
    keys = torch.stack([part.mean(1) for part in k.split(BLOCK, 1)], 2)
    keys = keys - keys.mean(2, keepdim=True)
    scores = queries @ keys.transpose(-1, -2) * scale
    count, (first, end) = scores.shape[-1], blocks["sink_blocks"]
    places = torch.arange(count)
    sinks = (places >= first) & (places < end)
    if blocks["topk_ratio"]:
        free = count - int(sinks.sum())
        wanted = max(0, min(free - 1, max(1, round(blocks["topk_ratio"] * free))))
        ranked = scores.masked_fill(sinks, -torch.inf)
        least = ranked.topk(wanted, -1).values[..., -1:] if wanted else torch.full_like(ranked[..., :1], torch.inf)
        exact = ranked >= least
    else:
        spread = (queries.square() * keys.square().mean(2, keepdim=True)).sum(-1, keepdim=True)
        exact = scores > blocks["tau"] * (spread * scale**2 + 1e-6).sqrt()
    exact = exact | ((places[:, None] - places).abs() <= 1) | sinks
    first, end = blocks["sink_q"]
    return exact | ((places >= first) & (places < end))[:, None]


def sol_attention(q: Tensor, k: Tensor, v: Tensor, **blocks: Any) -> Tensor:
    """`[B, T, H, D]`: blocks that are not chosen count as their mean key and the sum of their values."""
    dtype = v.dtype
    q, k, v = q.double(), k.double(), v.double()
    exact = chosen(q, k, blocks)
    k_mean = torch.stack([part.mean(1) for part in k.split(BLOCK, 1)], 1).mean(1, keepdim=True)
    k = k - k_mean  # as the package does; the softmax is the same
    scale = q.shape[-1] ** -0.5
    sizes = torch.tensor([part.shape[1] for part in k.split(BLOCK, 1)])
    outs = []
    for number, part in enumerate(q.split(BLOCK, 1)):
        keep = exact[:, :, number]  # [B, H, N]
        scores = torch.einsum("bqhd,bkhd->bhqk", part, k) * scale
        scores = scores.masked_fill(~keep.repeat_interleave(BLOCK, -1)[..., None, : k.shape[1]], -torch.inf)
        means = torch.stack([block.mean(1) for block in k.split(BLOCK, 1)], 2)
        of_means = (part.mean(1)[:, :, None] * means).sum(-1) * scale  # every row has its block's
        of_means = of_means.masked_fill(keep, -torch.inf)[:, :, None].expand(-1, -1, part.shape[1], -1)
        weights = torch.cat([scores, of_means + sizes.log()], -1).softmax(-1)
        mean_values = torch.stack([block.mean(1) for block in v.split(BLOCK, 1)], 2)
        values = torch.cat([v.transpose(1, 2), mean_values], 2)
        outs.append((weights @ values).transpose(1, 2))
    return torch.cat(outs, 1).to(dtype)


def kitchen(function: Callable[..., Any] = sol_attention, **more: Any) -> dict[str, SimpleNamespace]:
    """comfy-kitchen's modules by name, with this attention, and the reference beside it."""
    return {
        "comfy_kitchen": SimpleNamespace(sol_attn=function, **more),
        "comfy_kitchen.backends.eager.sol_attn": SimpleNamespace(sol_attn=sol_attention),
    }
