"""Small layers and embeddings of diffusion transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Affine(nn.Module):
    """LayerNorm with weight and bias, computed in fp32 (eps 1e-5 of PyTorch where called by itself)."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = parameter(dim, device=device, dtype=dtype)
        self.bias = parameter(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float()).to(x.dtype)


class Scale(nn.Module):
    """The weight of an RMS norm."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = parameter(dim, device=device, dtype=dtype)


def sinusoidal_embedding(dim: int, position: Tensor) -> Tensor:
    """`[n] -> [n, dim]`: cosines, then sines, of geometrically spaced frequencies; fp32 from fp64."""
    half = torch.arange(dim // 2, device=position.device, dtype=torch.float64)
    angles = position.double()[:, None] * torch.pow(10000, -half / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def parameter(*shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised weight; it never takes gradients."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)
