"""The transformer layer that CLIP's text and vision models and SigLIP's vision model share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..weights.linear.linear import Linear
from .layers import parameter


@dataclass(frozen=True)
class LayerSizes:
    """Widths of one layer; `eps` is that of its norms."""

    dim: int
    ffn_dim: int
    num_heads: int
    eps: float


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `x [B, L, dim]` is fp32 and the layers compute in `dtype`."""

    def __init__(self, sizes: LayerSizes, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer_norm1 = LayerNorm(sizes.dim, sizes.eps)
        self.self_attn = SelfAttention(sizes)
        self.layer_norm2 = LayerNorm(sizes.dim, sizes.eps)
        self.mlp = FeedForward(sizes, activation)

    def forward(self, x: Tensor, dtype: torch.dtype, causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x, dtype), causal)
        return x + self.mlp(self.layer_norm2(x, dtype))


class SelfAttention(nn.Module):
    """Attention with biases; `causal` lets a token see those before it only."""

    def __init__(self, sizes: LayerSizes):
        super().__init__()
        self.num_heads = sizes.num_heads
        self.q_proj = Linear(sizes.dim, sizes.dim)
        self.k_proj = Linear(sizes.dim, sizes.dim)
        self.v_proj = Linear(sizes.dim, sizes.dim)
        self.out_proj = Linear(sizes.dim, sizes.dim)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, L, D]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, sizes: LayerSizes, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(sizes.dim, sizes.ffn_dim)
        self.fc2 = Linear(sizes.ffn_dim, sizes.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class LayerNorm(nn.Module):
    """LayerNorm computed in fp32, its result in `dtype`."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = parameter(dim), parameter(dim)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps).to(dtype)


class Layers(nn.Module):
    """The stack; a module only because the parameter names have it."""

    def __init__(self, num_layers: int, sizes: LayerSizes, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(sizes, activation) for _ in range(num_layers))


class Rows(nn.Module):
    """A table by its name; whoever uses it gathers."""

    def __init__(self, num_rows: int, dim: int):
        super().__init__()
        self.weight = parameter(num_rows, dim)
