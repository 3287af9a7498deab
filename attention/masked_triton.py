"""Attention to chosen blocks of keys as a Triton kernel: one program per block of queries and head.

A program reads the list of the blocks that it attends and nothing of the others; sums are in fp32, as in FlashAttention
(Dao, arXiv:2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masked import MASK_BLOCK

KEYS_AT_ONCE = 64


class TritonBlocks:
    """See `MaskedAttention`."""

    name = "triton"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """See `MaskedAttention`."""
        heads, num_queries, num_keys = keep.shape
        q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
        head_dim = q.shape[3]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        counts = keep.sum(-1, dtype=torch.int32)
        chosen = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        _attend_kernel[(num_queries, heads)](
            q, k, v, out, chosen, counts, num_queries, num_keys, head_dim**-0.5,
            q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2), out.stride(1), out.stride(2),
            DIM=head_dim, WIDE=triton.next_power_of_2(head_dim), BLOCK=MASK_BLOCK, STEP=KEYS_AT_ONCE,
            num_warps=8, num_stages=2,
        )  # fmt: skip
        return out


@triton.jit
def _attend_kernel(
    q, k, v, out, chosen, counts, num_queries, num_keys, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDE)
    real = columns[None, :] < DIM
    queries = tl.load(q + rows[:, None] * q_row + head * q_head + columns[None, :], mask=real, other=0.0)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, WIDE], tl.float32)
    place = head * num_queries + block
    count = tl.load(counts + place)
    for step in range(count * (BLOCK // STEP)):
        key_block = tl.load(chosen + place * num_keys + step // (BLOCK // STEP)).to(tl.int64)
        key_rows = key_block * BLOCK + (step % (BLOCK // STEP)) * STEP + tl.arange(0, STEP)
        there = key_rows[:, None] * k_row + head * k_head + columns[None, :]
        keys = tl.load(k + there, mask=real, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        factor = tl.exp2(largest - larger)
        there = key_rows[:, None] * v_row + head * v_head + columns[None, :]
        values = tl.load(v + there, mask=real, other=0.0)
        sums = sums * factor[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * factor + tl.sum(weights, 1)
        largest = larger
    attended = sums / tl.where(total > 0, total, 1.0)[:, None]
    there = rows[:, None] * out_row + head * out_head + columns[None, :]
    tl.store(out + there, attended.to(out.dtype.element_ty), mask=real)
