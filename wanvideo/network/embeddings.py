"""What surrounds the blocks of a Wan transformer: patches, image tokens, timesteps, rotary angles.

Source: Wan-Video/Wan2.1 (`wan/modules/model.py`); parameter names are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...fused.ops import Rope
from ...team.share import Part
from ...transformer.layers import Affine, parameter
from ...transformer.workspace import Workspace
from ...weights.linear.linear import Linear
from .config import WanConfig


class PatchEmbedding(nn.Module):
    """Latent patches to tokens; a convolution whose stride is its kernel, so a plain matrix product."""

    def __init__(
        self,
        config: WanConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        in_channels: int | None = None,
    ):
        super().__init__()
        self.patch_size, self.out_channels = config.patch_size, config.out_channels
        channels = config.in_channels if in_channels is None else in_channels
        self.weight = parameter(config.dim, channels, *config.patch_size, device=device, dtype=dtype)
        self.bias = parameter(config.dim, device=device, dtype=dtype)

    def forward(self, latent: Tensor, work: Workspace, part: Part | None = None) -> Tensor:
        """`[B, C, T, H, W] -> [rows, dim]`, of all tokens or of a card's `part` of them."""
        pt, ph, pw = self.patch_size
        patches = rearrange(
            latent.to(work.dtype),
            "b c (t pt) (h ph) (w pw) -> (b t h w) (c pt ph pw)",
            pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        if part is not None:
            patches = part.cut(patches, latent.shape[0])
        weight, bias = self.weight.to(work.dtype).flatten(1), self.bias.to(work.dtype)
        return torch.addmm(bias, patches, weight.t())

    def grid(self, latent: Tensor) -> tuple[int, int, int]:
        """Tokens along time, height and width; ValueError where the latent does not suit the model."""
        channels, size = latent.shape[1], tuple(latent.shape[2:])
        if channels != self.weight.shape[1]:
            raise ValueError(
                f"the latent has {channels} channels but this Wan model takes {self.weight.shape[1]}: "
                "use the VAE (and, for image-to-video, the conditioning) that belongs to this model"
            )
        if any(n % p for n, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(
                f"the latent's size {size} (frames, height, width) is not divisible by the patch {self.patch_size}: "
                "choose a height and width that are multiples of 16 (32 for TI2V 5B)"
            )
        t, h, w = (n // p for n, p in zip(size, self.patch_size, strict=True))
        return t, h, w

    def unpatchify_into(self, out: Tensor, patches: Tensor) -> Tensor:
        """Write `patches [rows, out * patch volume]` into `out [B, out, T, H, W]`, and return that."""
        pt, ph, pw = self.patch_size
        there = rearrange(out, "b c (t pt) (h ph) (w pw) -> b t h w pt ph pw c", pt=pt, ph=ph, pw=pw)
        there.copy_(patches.view(there.shape))
        return out


class ImageEmbedding(nn.Module):
    """CLIP vision tokens to the model's width; first-last-frame models add a position to each of 2 x 257."""

    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = config.image_dim
        self.proj = nn.Sequential(
            Affine(dim, **factory),
            Linear(dim, dim, **factory),
            nn.GELU(),
            Linear(dim, config.dim, **factory),
            Affine(config.dim, **factory),
        )
        self.emb_pos: nn.Parameter | None = None
        if config.image_pos_tokens:
            self.emb_pos = parameter(1, config.image_pos_tokens, dim, **factory)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.emb_pos is not None:
            tokens = tokens + self.emb_pos[:, : tokens.shape[1]].to(tokens.dtype)  # fewer where one picture is given
        return self.proj(tokens)


class ReferenceEmbedding(nn.Module):
    """The latent of a reference picture `[B, z, h, w]` to the tokens of one frame, `[B, tokens, dim]`."""

    def __init__(self, config: WanConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = parameter(
            config.dim, config.reference_channels, *config.patch_size[1:], device=device, dtype=dtype
        )
        self.bias = parameter(config.dim, device=device, dtype=dtype)

    def forward(self, picture: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.conv2d(picture.to(dtype), weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class AxisPositions:
    """Positions of the tokens along (t, h, w): `shift + scale * index`."""

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)


# (t, h, w) positions [1, tokens, 3] -> rotation matrices [1, 1, tokens, head_dim / 2, 2, 2]
Rotate = Callable[[Tensor], Tensor]


def given_angles(grid: tuple[int, int, int], rotate: Rotate, device: torch.device, positions: AxisPositions) -> Rope:
    """The angles of a (t, h, w) grid whose positions `rotate` turns into rotations."""
    along = [
        positions.shift[axis] + positions.scale[axis] * torch.arange(size, dtype=torch.float32, device=device)
        for axis, size in enumerate(grid)
    ]
    matrices = rotate(torch.cartesian_prod(*along)[None])[0, 0].float()
    return Rope(matrices[..., 0, 0].contiguous(), matrices[..., 1, 0].contiguous())


def rotary_angles(
    grid: tuple[int, int, int],
    head_dim: int,
    device: torch.device,
    positions: AxisPositions = AxisPositions(),  # noqa: B008 - immutable
) -> Rope:
    """Angles of the tokens of a (t, h, w) grid: the head is split (d - 4 (d // 6), 2 (d // 6), 2 (d // 6))."""
    third = 2 * (head_dim // 6)
    cos, sin = [], []
    for axis, (size, dim) in enumerate(zip(grid, (head_dim - 2 * third, third, third), strict=True)):
        frequency = torch.pow(10000, -torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        index = torch.arange(size, dtype=torch.float64, device=device)
        angles = (positions.shift[axis] + positions.scale[axis] * index)[:, None] * frequency
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        cos.append(angles.cos().float().view(shape).expand(*grid, -1))
        sin.append(angles.sin().float().view(shape).expand(*grid, -1))
    return Rope(torch.cat(cos, -1).flatten(0, 2), torch.cat(sin, -1).flatten(0, 2))
