"""Attention of blocks of tokens to chosen blocks of others, exactly: what each head leaves out is not computed.

Of queries, and of keys and values, 128 in a row are a block; a mask says for every head which blocks of keys a block of
queries attends. Block-sparse attention as in mit-han-lab/Block-Sparse-Attention, which FlashVSR is trained with.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_BLOCK = 128  # tokens


class MaskedAttention(Protocol):
    """One way to compute it."""

    name: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """Attention of `q [1, Lq, H, D]` over `k, v [1, Lk, H, D]`; returns `[1, Lq, H, D]`.

        `keep [H, Lq / 128, Lk / 128]` are the blocks that are attended. Queries that attend nothing get zeros.
        """
        ...


class GatheredBlocks:
    """PyTorch alone: for each block of queries the blocks that any head needs are laid beside each other."""

    name = "gathered"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """See `MaskedAttention`."""
        heads, num_queries, _ = keep.shape
        queries, keys, values = (in_blocks(each) for each in (q, k, v))  # [blocks, H, 128, D]
        out = torch.empty_like(queries)
        most = keep.sum(-1).amax(0).tolist()  # of any head, for each block of queries
        chosen = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)  # [H, blocks, blocks], kept first
        head = torch.arange(heads, device=q.device)[:, None]
        for index in range(num_queries):
            width = most[index]
            if not width:
                out[index] = 0
                continue
            places = chosen[:, index, :width]  # [H, width]
            allowed = keep[:, index].gather(-1, places)
            mask = allowed.repeat_interleave(MASK_BLOCK, -1)[:, None]  # [H, 1, width * 128]
            near_keys, near_values = (each[places, head].flatten(1, 2) for each in (keys, values))
            attended = F.scaled_dot_product_attention(queries[index], near_keys, near_values, attn_mask=mask)
            out[index] = torch.where(allowed.any(-1)[:, None, None], attended, 0)
        return out.permute(0, 2, 1, 3).flatten(0, 1)[None]


def in_blocks(x: Tensor) -> Tensor:
    """`[1, L, H, D]` as `[blocks, H, 128, D]`."""
    return x[0].unflatten(0, (-1, MASK_BLOCK)).transpose(1, 2)
