"""Which way computes attention by a mask of blocks on a device."""

from __future__ import annotations

import torch

from ..system.kernel_choice import Chosen, Trial, choose, disagreement, kept_when_final, loaded, relative_error
from .masked import MASK_BLOCK, GatheredBlocks, MaskedAttention


@kept_when_final
def select_masked(device: torch.device, dtype: torch.dtype, head_dim: int) -> Chosen[MaskedAttention]:
    """The fastest way that is right on this device: a Triton kernel on a GPU, else PyTorch."""
    plain = GatheredBlocks()
    if device.type != "cuda":
        return Chosen(plain)
    trial: Trial[MaskedAttention] = Trial(
        "block-sparse attention", device, lambda each: _disagreement(each, plain, (device, dtype, head_dim))
    )
    return choose(trial, loaded(trial.what, _triton), plain)


def _triton() -> tuple[MaskedAttention, ...]:
    from .masked_triton import TritonBlocks

    return (TritonBlocks(),)


def _disagreement(
    attention: MaskedAttention, reference: MaskedAttention, spec: tuple[torch.device, torch.dtype, int]
) -> str | None:
    device, dtype, head_dim = spec
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length * MASK_BLOCK, 3, head_dim, generator=generator) for length in (3, 5, 5))
    keep = torch.rand(3, 3, 5, generator=generator) < 0.5
    keep[1, 2] = False
    want = reference.attend(q, k, v, keep)
    there = [each.to(device, dtype) for each in (q, k, v)]
    got = attention.attend(there[0], there[1], there[2], keep.to(device))
    return disagreement(relative_error(got.cpu(), want))
