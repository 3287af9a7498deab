"""Camera movement as an input: the Pluecker rays of every pixel become tokens that are added to the video's.

Source: aigc-apps/VideoX-Fun (`wan_camera_adapter.py`); parameter names are theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.layers import parameter
from .config import WanConfig

PIXELS = 8  # per latent position, each way


class CameraAdapter(nn.Module):
    """Rays of a latent frame `[B, 24, 8 h, 8 w]` (6 numbers of 4 frames) to its tokens `[B, tokens, dim]`."""

    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = Conv2d(config.camera_channels * PIXELS**2, config.dim, config.patch_size[1], **factory)
        self.residual_blocks = nn.Sequential(ResidualBlock(config.dim, **factory))

    def forward(self, rays: Tensor, dtype: torch.dtype) -> Tensor:
        features = self.conv(F.pixel_unshuffle(rays.to(dtype), PIXELS), stride=self.conv.weight.shape[-1])
        return self.residual_blocks(features).flatten(2).transpose(1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.conv1 = Conv2d(dim, dim, 3, device=device, dtype=dtype)
        self.conv2 = Conv2d(dim, dim, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu_(self.conv1(x, padding=1)), padding=1)


class Conv2d(nn.Module):
    """A convolution whose weights take the dtype of what they are applied to."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = parameter(out_channels, in_channels, kernel, kernel, device=device, dtype=dtype)
        self.bias = parameter(out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), stride, padding)
