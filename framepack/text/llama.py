"""LLaMA 3's decoder as a text encoder: token embeddings in, the hidden states of an inner layer out.

Source: Llama Team 2024, https://arxiv.org/abs/2407.21783; parameter names are those of Hugging Face's `LlamaModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.layers import parameter
from ...weights.linear.linear import Linear


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a LLaMA 3 decoder; the defaults are the 8B one, as far as HunyuanVideo runs it.

    `num_layers` are those that run. `interleaved` is the order of a head's dimensions in llama.cpp's files, where the
    two of each rotated pair are neighbours; elsewhere they are half a head apart.
    """

    vocab_size: int = 128320
    dim: int = 4096
    ffn_dim: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_layers: int = 30
    rope_theta: float = 500000.0
    eps: float = 1e-5
    interleaved: bool = False


class LlamaDecoder(nn.Module):
    """The layers, without token table, last norm and head.

    `stream` hands out the layers with their weights on the device of the embeddings.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.stream: Callable[[Iterable[nn.Module]], Iterator[nn.Module]] = iter
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))

    def forward(self, embeddings: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`embeddings [B, L, dim]` -> hidden states `[B, L, dim]` fp32, as layer `num_layers` leaves them.

        Texts of a batch start together; what fills up the shorter ones at the end changes none of their own tokens.
        The residual stream is fp32 whatever `dtype` the layers compute in: a few of its channels are huge.
        """
        x = embeddings.float()
        rotation = rotary_table(x.shape[1], self.config).to(x.device)
        for layer in self.stream(self.layers):
            x = layer(x, rotation, dtype)
        return x


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = GroupedAttention(config)
        self.mlp = GatedFeedForward(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, rotation: Tensor, dtype: torch.dtype) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, dtype), rotation)
        return x + self.mlp(self.post_attention_layernorm(x, dtype))


class GroupedAttention(nn.Module):
    """Causal attention in which several heads share keys and values (Ainslie et al. 2023)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        query_dim, key_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, query_dim, bias=False)
        self.k_proj = Linear(config.dim, key_dim, bias=False)
        self.v_proj = Linear(config.dim, key_dim, bias=False)
        self.o_proj = Linear(query_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """`x [B, L, dim]`, `rotation [2, L, head_dim / 2]` -> `[B, L, dim]`."""
        config = self.config
        q, k, v = (
            project(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, L, D]
        q, k = (rotate(heads, rotation, config.interleaved) for heads in (q, k))
        # By repetition: torch before 2.5 knows no groups.
        k, v = (heads.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1) for heads in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in fp32."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.eps = config.eps
        self.weight = parameter(config.dim)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(dtype)


def rotary_table(length: int, config: LlamaConfig) -> Tensor:
    """Cosines and sines `[2, L, head_dim / 2]` fp32, made on the CPU so that every device rounds alike.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] * (1.0 / config.rope_theta**exponents)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(heads: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of `heads [B, H, L, D]` by the angles of their positions; in fp32, back in the dtype given."""
    cos, sin = rotation
    x = heads.float()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    # Queries and keys need one order between them, so interleaved pairs need not be put back.
    return torch.cat(turned, dim=-1).to(heads.dtype)
