"""The UMT5 text encoder of Wan: prompts in, context tokens out.

Source of the architecture: Raffel et al. 2020 (T5), Chung et al. 2023 (UMT5: a position bias in every layer), and
Wan-Video/Wan2.1 `wan/modules/t5.py`. Parameter names are those of Hugging Face and of ComfyUI's repackaged files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...weights.linear.linear import Linear
from .tokenizer import Tokenizer

# Attention masks whose rows are a multiple of this long take the fast kernels; the tokens added are masked.
LENGTH_MULTIPLE = 8


@dataclass(frozen=True)
class UMT5Config:
    """Dimensions of one UMT5 encoder; the defaults are umt5-xxl.

    Relative positions fall into `num_buckets` buckets, half of them for each direction; positions `max_distance`
    tokens away and further share the last one.
    """

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.attention_dim // self.num_heads


class TextEncoder:
    """A UMT5 encoder with its tokenizer and its token table, on `device`.

    `embed` looks tokens up: integers of any shape in, `[*shape, dim]` fp32 on the CPU out. `dtype` is what it computes
    in: float32 on a CPU and bfloat16 elsewhere when None. float16 raises ValueError, because the feed-forward outputs
    of T5 exceed its range; weights may be *stored* in any floating-point dtype.
    """

    def __init__(
        self,
        model: UMT5Encoder,
        embed: Callable[[Tensor], Tensor],
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ):
        if dtype == torch.float16:
            raise ValueError("text encoder dtype float16 overflows in T5: use bfloat16 or float32")
        self.model, self.embed, self.tokenizer, self.device = model, embed, tokenizer, device
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Context `[B, num_tokens, dim]` on the device; rows past a prompt's own tokens are zeros.

        An empty prompt is allowed and is the single token `</s>`. ValueError if `prompts` is empty or a bare string.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of at least one string, got {prompts!r}")
        ids, mask = self.tokenizer.encode(prompts)
        return self.hidden_states(self.embed(ids), mask)

    def hidden_states(self, embeddings: Tensor, mask: Tensor, num_layers: int | None = None) -> Tensor:
        """`embeddings [B, L, dim]` of the tokens and their `mask [B, L]` -> `[B, L, dim]` on the device.

        Masked tokens become zeros. They change nothing, so only as many tokens run as the longest prompt has.
        """
        longest = int(mask.sum(dim=1).max())
        length = min(math.ceil(longest / LENGTH_MULTIPLE) * LENGTH_MULTIPLE, mask.shape[1])
        mask = mask[:, :length].to(self.device, torch.bool)
        hidden = self.model(embeddings[:, :length].to(self.device), mask, self.dtype, num_layers)
        context = hidden.new_zeros(*embeddings.shape[:2], hidden.shape[-1])
        context[:, :length] = hidden.masked_fill(~mask[..., None], 0)
        return context


class UMT5Encoder(nn.Module):
    """The encoder stack without its token table. Weights are uninitialised until a checkpoint is assigned.

    `stream` hands out the blocks with their weights on the device of the embeddings; the last norm may stay elsewhere.
    """

    def __init__(self, config: UMT5Config, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.stream: Callable[[Iterable[nn.Module]], Iterator[nn.Module]] = iter
        self.encoder = Stack(config, device)

    def forward(
        self,
        embeddings: Tensor,
        mask: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        num_layers: int | None = None,
    ) -> Tensor:
        """`embeddings` and hidden states `[B, L, dim]`, these in `dtype`; `mask [B, L]` is True for what to attend to.

        The residual stream is float32 whatever `dtype` is: its few huge channels would cost bfloat16 the others.
        `num_layers` leaves out the blocks after these.
        """
        config, device = self.config, embeddings.device
        x = embeddings.float()
        buckets = position_buckets(x.shape[1], config.num_buckets, config.max_distance).to(device)
        bias = mask_bias(mask, dtype, device)
        for block in self.stream(self.encoder.block[:num_layers]):
            x = block(x, buckets, bias, dtype)
        return self.encoder.final_layer_norm(x, dtype)


class Stack(nn.Module):
    """Blocks and the last norm; a module only because the parameter names have it."""

    def __init__(self, config: UMT5Config, device: torch.device | str | None):
        super().__init__()
        self.block = nn.ModuleList(Block(config, device) for _ in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.dim, config.eps, device)


class Block(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: UMT5Config, device: torch.device | str | None):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, device), FeedForwardLayer(config, device)])

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        x = self.layer[0](x, buckets, mask, dtype)
        return self.layer[1](x, dtype)


class AttentionLayer(nn.Module):
    """x + SelfAttention(norm(x))."""

    def __init__(self, config: UMT5Config, device: torch.device | str | None):
        super().__init__()
        self.SelfAttention = SelfAttention(config, device)
        self.layer_norm = RMSNorm(config.dim, config.eps, device)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x, dtype), buckets, mask)


class FeedForwardLayer(nn.Module):
    """x + DenseReluDense(norm(x))."""

    def __init__(self, config: UMT5Config, device: torch.device | str | None):
        super().__init__()
        self.DenseReluDense = GatedFeedForward(config, device)
        self.layer_norm = RMSNorm(config.dim, config.eps, device)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x, dtype))


class SelfAttention(nn.Module):
    """Attention without scaling (T5 folds it into the initialisation) and with a learned bias per bucket and head."""

    def __init__(self, config: UMT5Config, device: torch.device | str | None):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = Linear(config.dim, config.attention_dim, bias=False, device=device)
        self.k = Linear(config.dim, config.attention_dim, bias=False, device=device)
        self.v = Linear(config.dim, config.attention_dim, bias=False, device=device)
        self.o = Linear(config.attention_dim, config.dim, bias=False, device=device)
        self.relative_attention_bias = Table(config.num_buckets, config.num_heads, device)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """`x [B, L, dim]`, `buckets [L, L]`, `mask [B, 1, 1, L]` (0 or -inf) -> `[B, L, dim]`."""
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )  # [B, H, L, D]
        bias = self.relative_attention_bias.weight.to(x.dtype).t()[:, buckets]  # [H, L, L]
        bias = bias[None] if mask is None else bias + mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """wo(gelu(wi_0(x)) * wi_1(x)), GELU in its tanh form."""

    def __init__(self, config: UMT5Config, device: torch.device | str | None):
        super().__init__()
        self.wi_0 = Linear(config.dim, config.ffn_dim, bias=False, device=device)
        self.wi_1 = Linear(config.dim, config.ffn_dim, bias=False, device=device)
        self.wo = Linear(config.ffn_dim, config.dim, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32."""

    def __init__(self, dim: int, eps: float, device: torch.device | str | None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device), requires_grad=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x * self.weight.to(x)).to(dtype)


class Table(nn.Module):
    """A table by its name; whoever uses it gathers."""

    def __init__(self, num_rows: int, dim: int, device: torch.device | str | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim, device=device), requires_grad=False)


def mask_bias(mask: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`mask [B, L]` -> what is added to the attention scores, `[B, 1, 1, L]`: 0 where True, -inf elsewhere."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=device)
    return bias.masked_fill(~mask.to(device, torch.bool), -math.inf)[:, None, None]


def position_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of every (query, key) pair, `[L, L]`, on the CPU so that every device rounds the logarithm alike.

    Per direction, half of the buckets hold one distance each and the other half logarithmic ranges up to
    `max_distance` (Raffel et al. 2020, section 2.1).
    """
    num_buckets //= 2
    num_exact = num_buckets // 2
    positions = torch.arange(length)
    offset = positions[None, :] - positions[:, None]  # key - query
    distance = offset.abs()
    # Distances under num_exact do not use the logarithm; the clamp keeps log(0) out of the integer cast.
    ratio = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    coarse = (num_exact + (ratio * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < num_exact, distance, coarse) + (offset > 0) * num_buckets
