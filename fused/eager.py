"""The elementwise steps in plain PyTorch: the reference, and what runs without Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import FP16_MAX, SMALLEST_SCALE, FusedOps, NormedRows, Rope

PIECE = 4096  # rows


class EagerOps:
    """See `FusedOps` for what each step computes."""

    name = "eager"

    def makes_late_rows(self, dim: int) -> bool:
        return False

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

    def modulated_rows(
        self, x: Tensor, shift: Tensor, scale: Tensor, first_row: int, rows_per_group: int, eps: float
    ) -> Tensor:
        return self.modulated_norm(x, shift, scale, first_row, rows_per_group, eps)

    def affine_rows(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self.affine_norm(x, weight, bias, eps)

    def quantize_normed(
        self, rows: NormedRows, dtype: torch.dtype, largest: float, smallest_scale: float
    ) -> tuple[Tensor, Tensor]:
        values, scales = _in_8_bits(rows.tensor().float(), largest, smallest_scale)
        if not dtype.is_floating_point:
            values.round_()
        return values.clamp_(-largest, largest).to(dtype), scales

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
        made, of_heads = _in_8_bits(x.float(), 127, SMALLEST_SCALE)
        scales.copy_(of_heads[..., 0])
        values.copy_(made.round_().clamp_(-127, 127))

    def unpack_heads(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        for rows, factors, there in zip(values.split(PIECE), scales.split(PIECE), out.split(PIECE), strict=True):
            there.copy_(rows * factors[..., None])  # fp32 for a piece of them at a time

    def gated_add_(self, x: Tensor, y: Tensor, gate: Tensor, first_row: int, rows_per_group: int) -> None:
        gate = gate[_group_of_rows(x, gate, first_row, rows_per_group)]
        if x.dtype == torch.float16:
            x.copy_(torch.addcmul(x.float(), _finite(y.float()), gate).clamp_(-FP16_MAX, FP16_MAX))
        else:
            x.copy_(torch.addcmul(x.float(), y.float(), gate))


def _in_8_bits(x: Tensor, largest: float, smallest_scale: float) -> tuple[Tensor, Tensor]:
    """Runs `[..., D]` fp32 times the inverse of their scales, and these, `[..., 1]`."""
    peak = x.abs().amax(-1, keepdim=True)
    # by a tensor: on a GPU PyTorch divides by a number as a product with its reciprocal, which rounds otherwise
    scales = (peak / torch.full_like(peak, largest)).clamp_(min=smallest_scale)
    return x * scales.reciprocal(), scales


def _finite(y: Tensor) -> Tensor:
    """fp16's infinities as its largest numbers."""
    return y.clamp(-FP16_MAX, FP16_MAX)


def _group_of_rows(x: Tensor, modulation: Tensor, first_row: int, rows_per_group: int) -> Tensor | slice:
    first, last = (row // rows_per_group for row in (first_row, first_row + x.shape[0] - 1))
    if first == last:  # one group: broadcast instead of gathering
        return slice(first, first + 1)
    return torch.arange(first_row, first_row + x.shape[0], device=modulation.device) // rows_per_group
