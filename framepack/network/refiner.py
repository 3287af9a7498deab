"""The text of a prompt as the blocks read it: refined for every step by two blocks of self-attention.

Source: Tencent/HunyuanVideo (`hyvideo/modules/token_refiner.py`); parameter names are diffusers'.
"""

from __future__ import annotations

from typing import cast

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.execution import Execution
from ...transformer.layers import Affine
from ...weights.linear.linear import Linear
from .blocks import FeedForward, Modulation
from .config import FramePackConfig
from .embeddings import TimeTextEmbedding

MLP_RATIO = 4


class TokenRefiner(nn.Module):
    """Text `[1, n, text_dim]` to `[S, n, dim]`, one for each of S timesteps."""

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(config, config.text_dim, guided=False)
        self.proj_in = Linear(config.text_dim, config.dim)
        blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.num_refiner_layers))
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def forward(self, text: Tensor, timesteps: Tensor, execution: Execution) -> Tensor:
        """As many steps at once as have no more rows than a chunk; `text` is in the dtype that computes."""
        mean = text.float().mean(1).to(text.dtype)
        time = self.time_text_embed(timesteps, mean)  # [S, dim]
        tokens = self.proj_in(text)  # [1, n, dim]
        refined = tokens.new_empty(time.shape[0], *tokens.shape[1:])
        at_once = max(1, execution.token_chunk // text.shape[1])
        for out, part in zip(refined.split(at_once), time.split(at_once), strict=True):
            out.copy_(tokens)
            for block in cast(nn.ModuleList, self.token_refiner["refiner_blocks"]):
                block(out, part, execution)
        return refined


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward, each added to `x [S, n, dim]` in place with a gate of its step."""

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.eps = config.eps
        self.norm1, self.norm2 = (Affine(config.dim) for _ in range(2))
        self.attn = RefinerAttention(config)
        self.ff = FeedForward(config.dim, MLP_RATIO * config.dim)
        self.norm_out = Modulation(config, 2)

    def forward(self, x: Tensor, time: Tensor, execution: Execution) -> None:
        gates = self.norm_out(time)[:, :, None]  # [S, 2, 1, dim]
        x.addcmul_(self.attn(self.normed(x, self.norm1), execution), gates[:, 0])
        hidden = self.ff.widen(self.normed(x, self.norm2))
        x.addcmul_(self.ff.narrow(F.silu(hidden, inplace=True)), gates[:, 1])

    def normed(self, x: Tensor, norm: Affine) -> Tensor:
        weight, bias = norm.weight.float(), norm.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


class RefinerAttention(nn.Module):
    """`[S, n, dim]`, each step's tokens to themselves."""

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.num_heads, dim = config.num_heads, config.dim
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: Tensor, execution: Execution) -> Tensor:
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = (rearrange(layer(x), "s n (h d) -> s n h d", h=self.num_heads) for layer in layers)
        return self.to_out[0](rearrange(execution.attention.attend(q, k, v), "s n h d -> s n (h d)"))
