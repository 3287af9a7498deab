"""The elementwise steps in plain PyTorch: the reference, and what runs without Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import FP16_MAX, SMALLEST_SCALE, FusedOps, Rope

PIECE = 4096  # rows


class EagerOps:
    """See `FusedOps` for what each step computes."""

    name = "eager"

    def compiled(self) -> FusedOps:
        return self

    def modulated_norm(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        first_row: int,
        rows_per_group: int,
        eps: float,
        out: Tensor | None = None,
    ) -> Tensor:
        rows = _group_of_rows(x, shift, first_row, rows_per_group)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
        made = (normed * (1 + scale[rows]) + shift[rows]).to(x.dtype)
        return made if out is None else out.copy_(made)

    def affine_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)

    def rms_norm_(self, x: Tensor, weight: Tensor, eps: float, rope: Rope | None, first_row: int) -> None:
        y = x.float().unflatten(-1, (-1, weight.shape[0]))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
        if rope is not None:
            num_tokens, half = rope.cos.shape
            token = torch.arange(first_row, first_row + x.shape[0], device=x.device) % num_tokens
            cos, sin = rope.cos[token, None], rope.sin[token, None]  # [rows, 1, head_dim / 2]
            real, imag = y.view(x.shape[0], -1, half, 2).unbind(-1)
            y = torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1)
        x.copy_(y.view(x.shape))

    def gelu_(self, x: Tensor) -> None:
        x.copy_(F.gelu(x.float(), approximate="tanh"))

    def pack_normed(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        rope: Rope | None,
        first_row: int,
        values: Tensor,
        scales: Tensor,
    ) -> None:
        self.rms_norm_(x, weight, eps, rope, first_row)
        self.pack_heads(x.view(values.shape), values, scales)

    def pack_heads(self, x: Tensor, values: Tensor, scales: Tensor) -> None:
        x = x.float()
        peak = x.abs().amax(-1)
        # by a tensor: on a GPU PyTorch divides by a number as a product with its reciprocal, which rounds otherwise
        scales.copy_((peak / torch.full_like(peak, 127)).clamp_(min=SMALLEST_SCALE))
        values.copy_((x * scales.reciprocal()[..., None]).round_().clamp_(-127, 127))

    def unpack_heads(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        for rows, factors, there in zip(values.split(PIECE), scales.split(PIECE), out.split(PIECE), strict=True):
            there.copy_(rows * factors[..., None])  # fp32 for a piece of them at a time

    def gated_add_(self, x: Tensor, y: Tensor, gate: Tensor, first_row: int, rows_per_group: int) -> None:
        gate = gate[_group_of_rows(x, gate, first_row, rows_per_group)]
        if x.dtype == torch.float16:
            x.copy_(torch.addcmul(x.float(), _finite(y.float()), gate).clamp_(-FP16_MAX, FP16_MAX))
        else:
            x.copy_(torch.addcmul(x.float(), y.float(), gate))


def _finite(y: Tensor) -> Tensor:
    """fp16's infinities as its largest numbers."""
    return y.clamp(-FP16_MAX, FP16_MAX)


def _group_of_rows(x: Tensor, modulation: Tensor, first_row: int, rows_per_group: int) -> Tensor | slice:
    first, last = (row // rows_per_group for row in (first_row, first_row + x.shape[0] - 1))
    if first == last:  # one group: broadcast instead of gathering
        return slice(first, first + 1)
    return torch.arange(first_row, first_row + x.shape[0], device=modulation.device) // rows_per_group
