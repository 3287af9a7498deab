"""SigLIP's vision model: a picture in, one token for each of its patches out.

Source: Zhai et al. 2023, https://arxiv.org/abs/2303.15343; parameter names are those of Hugging Face's
`SiglipVisionModel`, without `vision_model.` and without its pooling head, which FramePack does not use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.clip_layers import LayerNorm, Layers, LayerSizes, Rows
from ...transformer.layers import parameter


@dataclass(frozen=True)
class SiglipConfig:
    """Dimensions of a SigLIP vision model; the defaults are so400m-patch14-384."""

    dim: int = 1152
    ffn_dim: int = 4304
    num_heads: int = 16
    num_layers: int = 27
    image_size: int = 384
    patch_size: int = 14
    eps: float = 1e-6

    @property
    def num_tokens(self) -> int:
        """27 x 27: the last 6 rows and columns of 384 fill no patch."""
        return (self.image_size // self.patch_size) ** 2


class SiglipVisionModel(nn.Module):
    """A vision transformer without a class token."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        sizes = LayerSizes(config.dim, config.ffn_dim, config.num_heads, config.eps)
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Layers(config.num_layers, sizes, tanh_gelu)
        self.post_layernorm = LayerNorm(config.dim, config.eps)

    def forward(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`pixels [B, 3, image_size, image_size]` in -1 ... 1 -> the last hidden state `[B, num_tokens, dim]`, fp32."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x, dtype)
        return self.post_layernorm(x, torch.float32)


class PatchEmbeddings(nn.Module):
    """Patches to tokens, and their places added."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embedding = PatchConvolution(config)
        self.position_embedding = Rows(config.num_tokens, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.patch_size
        height, width = (length // size * size for length in pixels.shape[-2:])
        patches = rearrange(pixels[..., :height, :width].float(), "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)
        weight, bias = self.patch_embedding.weight.float(), self.patch_embedding.bias.float()
        return F.linear(patches, weight.flatten(1), bias) + self.position_embedding.weight.float()


class PatchConvolution(nn.Module):
    """A convolution whose kernel is its stride: a matrix for each patch."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.weight = parameter(config.dim, 3, config.patch_size, config.patch_size)
        self.bias = parameter(config.dim)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
