"""What surrounds the blocks of a FramePack transformer: patches of a video and its history, vectors, rotary angles.

Source: lllyasviel/FramePack (`diffusers_helper/models/hunyuan_video_packed.py`); parameter names are diffusers'.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.layers import parameter
from ...weights.linear.linear import Linear
from .config import FramePackConfig


class Patches(nn.Module):
    """Patches of a latent to tokens; a convolution whose stride is its kernel, so a plain matrix product."""

    def __init__(self, config: FramePackConfig, factor: int):
        super().__init__()
        pt, ph, pw = (factor * size for size in config.patch_size)
        self.weight = parameter(config.dim, config.in_channels, pt, ph, pw)
        self.bias = parameter(config.dim)

    def forward(self, latent: Tensor, out: Tensor) -> None:
        """`latent [1, c, t, h, w]`, its last frame, row and column repeated to whole patches; `out [tokens, dim]`."""
        pt, ph, pw = self.weight.shape[2:]
        t, h, w = (-size % patch for size, patch in zip(latent.shape[2:], (pt, ph, pw), strict=True))
        if t or h or w:
            latent = F.pad(latent, (0, w, 0, h, 0, t), mode="replicate")
        patches = rearrange(
            latent.to(out.dtype),
            "1 c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)",
            pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        weight, bias = self.weight.to(out.dtype).flatten(1), self.bias.to(out.dtype)
        torch.addmm(bias, patches, weight.t(), out=out)

    def grid(self, latent: Tensor) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        t, h, w = (-(-size // patch) for size, patch in zip(latent.shape[2:], self.weight.shape[2:], strict=True))
        return t, h, w


class PatchEmbedding(nn.Module):
    """Tokens of the latents that are made."""

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.proj = Patches(config, 1)


class HistoryEmbedding(PatchEmbedding):
    """Tokens of the latents that are shown: near ones in full, others in patches of 2 and 4 times the size."""

    def __init__(self, config: FramePackConfig):
        super().__init__(config)
        self.proj_2x = Patches(config, 2)
        self.proj_4x = Patches(config, 4)


class ImageProjection(nn.Module):
    """SigLIP's tokens `[1, m, image_dim]` to the model's width."""

    def __init__(self, config: FramePackConfig):
        super().__init__()
        self.up = Linear(config.image_dim, 3 * config.dim)
        self.down = Linear(3 * config.dim, config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.silu(self.up(tokens)))


class VectorEmbedding(nn.Module):
    """Linear, SiLU, linear: a vector `[n, in]` (angles of a number, or a text as a whole) to `[n, dim]`."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbedding(nn.Module):
    """The vector that modulates blocks: of a timestep, a text as a whole and, where it is so made, the guidance."""

    def __init__(self, config: FramePackConfig, text_dim: int, guided: bool):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.timestep_embedder = VectorEmbedding(config.freq_dim, config.dim)
        self.text_embedder = VectorEmbedding(text_dim, config.dim)
        self.guidance_embedder = VectorEmbedding(config.freq_dim, config.dim) if guided else None

    def forward(self, timesteps: Tensor, text: Tensor, guidance: float | None = None) -> Tensor:
        """`timesteps [S]`, `text [1, text_dim]` in the dtype that computes -> `[S, dim]`."""
        embedded = self.timestep_embedder(number_angles(self.freq_dim, timesteps).to(text.dtype))
        if self.guidance_embedder is not None:
            assert guidance is not None
            angles = number_angles(self.freq_dim, timesteps.new_tensor([guidance], dtype=torch.float32))
            embedded = embedded + self.guidance_embedder(angles.to(text.dtype))
        return embedded + self.text_embedder(text)


def number_angles(dim: int, numbers: Tensor) -> Tensor:
    """`[n] -> [n, dim]`: cosines, then sines, of geometrically spaced frequencies.

    In fp32 throughout, as the model was trained: a guidance of 10,000 turns so far that fp64 gives other angles.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[:, None] * torch.exp(-math.log(10000) * index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotary_angles(
    places: Tensor, size: tuple[int, int], factor: int, config: FramePackConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, head_dim / 2]` of frames that stand at `places [T]` of the time axis, fp32.

    `size` is a frame's height and width in tokens of factor 1. Tokens `factor` times as large have the mean over
    those that they stand for, the last of each axis repeated where they reach beyond it. As an angle depends on one
    axis only, that mean is one over that axis.
    """
    positions = [places.to(device), *(torch.arange(length, device=device) for length in size)]
    grid = [-(-axis.shape[0] // factor) for axis in positions]
    cos: list[Tensor] = []
    sin: list[Tensor] = []
    for axis, (position, dim) in enumerate(zip(positions, config.rope_axes, strict=True)):
        frequency = torch.pow(config.rope_theta, -torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        missing = grid[axis] * factor - position.shape[0]
        position = torch.cat([position, position[-1:].expand(missing)])
        angles = position.double()[:, None] * frequency
        shape = [1, 1, 1, dim // 2]
        shape[axis] = grid[axis]
        for table, values in ((cos, angles.cos()), (sin, angles.sin())):
            means = values.unflatten(0, (-1, factor)).mean(1).float()
            table.append(means.view(shape).expand(*grid, -1))
    return torch.cat(cos, -1).flatten(0, 2), torch.cat(sin, -1).flatten(0, 2)
