"""A kernel of Triton's by itself: whether it compiles and runs here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _doubled(source_ptr, target_ptr, num, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + place, mask=place < num, other=0.0)
    tl.store(target_ptr + place, 2.0 * values, mask=place < num)


def doubles(device: torch.device) -> bool:
    """Whether it gives what it should."""
    source = torch.arange(1000, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    _doubled[(triton.cdiv(1000, 256),)](source, target, 1000, BLOCK=256)
    return bool(torch.equal(target, 2.0 * source))
