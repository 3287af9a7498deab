"""CLIP's text model: token embeddings in, one vector for the whole prompt out.

Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020; parameter names are those of Hugging Face's
`CLIPTextModel`, without `text_model.`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...transformer.clip_layers import LayerNorm, Layers, LayerSizes, Rows


@dataclass(frozen=True)
class ClipTextConfig:
    """Dimensions of a CLIP text model; the defaults are those of CLIP-L (openai/clip-vit-large-patch14)."""

    vocab_size: int = 49408
    dim: int = 768
    ffn_dim: int = 3072
    num_heads: int = 12
    num_layers: int = 12
    num_positions: int = 77
    eps: float = 1e-5


class ClipTextModel(nn.Module):
    """A causal transformer. The token table is not part of it: a prompt needs but a few of its rows."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        sizes = LayerSizes(config.dim, config.ffn_dim, config.num_heads, config.eps)
        self.embeddings = Positions(config)
        self.encoder = Layers(config.num_layers, sizes, quick_gelu)
        self.final_layer_norm = LayerNorm(config.dim, config.eps)

    def forward(self, embeddings: Tensor, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`embeddings [B, L, dim]` of tokens and the place `ends [B]` of each text's end token -> `[B, dim]` fp32.

        Tokens after the end token change nothing: none before sees them.
        """
        positions = self.embeddings.position_embedding.weight[: embeddings.shape[1]]
        x = embeddings.float() + positions.float()
        for layer in self.encoder.layers:
            x = layer(x, dtype, causal=True)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), ends], torch.float32)


class Positions(nn.Module):
    """The table of positions under its name."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.position_embedding = Rows(config.num_positions, config.dim)


def quick_gelu(x: Tensor) -> Tensor:
    """The GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)
