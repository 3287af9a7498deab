"""Layers of the Wan video autoencoders: causal convolutions that remember, norms, resampling, shortcuts.

Every tensor is channels first, [B, C, T, H, W]. A video goes through in chunks of a few frames; what a later chunk
needs from an earlier one is held in a `CausalCache`, never in a module.
Parameter names are those of Wan-Video `wan/modules/vae2_1.py` and `vae2_2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CausalCache:
    """What one encode or decode pass remembers between chunks: the last input frames of each causal convolution.

    `first_chunk` is true until `advance` is called: the first frame of a video is coded alone, so the layers that
    change the frame rate leave it as it is. Dropping the cache frees everything the pass held.
    """

    def __init__(self) -> None:
        self.first_chunk = True
        self._tails: dict[nn.Module, Tensor] = {}

    def advance(self) -> None:
        """Say that a chunk has gone all the way through."""
        self.first_chunk = False

    def fill_history(self, conv: CausalConv3d, padded: Tensor) -> None:
        """Complete `padded` [B, C, conv.history + T, H, W], whose last T frames are this chunk's.

        Its leading frames become the ones that `conv` saw before (zeros at the start of the video), and its trailing
        ones are kept for the next chunk.
        """
        tail = self._tails.get(conv)
        if tail is None:
            padded[:, :, : conv.history].zero_()
        else:
            padded[:, :, : conv.history].copy_(tail)
        self.remember(conv, padded)

    def remember(self, conv: CausalConv3d, frames: Tensor) -> None:
        """Keep the last `conv.history` of `frames`, as a copy: a view would keep the whole activation alive."""
        tail = self._tails.get(conv)
        if tail is None:
            self._tails[conv] = frames[:, :, -conv.history :].clone()
        else:
            tail.copy_(frames[:, :, -conv.history :])


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution that sees no later frame; `history` is how many earlier frames it sees through the cache."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1) -> None:
        spatial_padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, (time_stride, 1, 1), spatial_padding)
        self.history = kernel[0] - time_stride

    # Every layer takes the cache, a convolution too.
    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:  # type: ignore[override]
        if self.history == 0:
            return super().forward(x)
        padded = self.new_padded(x)
        padded[:, :, self.history :].copy_(x)
        return self.convolve(padded, cache)

    def new_padded(self, x: Tensor) -> Tensor:
        """An uninitialised tensor like `x`, in the weights' memory format, with room for the history in front."""
        b, c, t, h, w = x.shape
        channels_last = self.weight.is_contiguous(memory_format=torch.channels_last_3d)
        return new_video(x, (b, c, self.history + t, h, w), channels_last)

    def convolve(self, padded: Tensor, cache: CausalCache) -> Tensor:
        """Convolve a tensor made by `new_padded`, once its own frames have been written."""
        cache.fill_history(self, padded)
        return super().forward(padded)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the channels (dim 1), at each position; the sum is taken in float32."""

    def __init__(self, dim: int, num_spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_spatial_dims))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalise `x` into `out`, a tensor of the same shape (a new one if not given)."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = x.shape[1] ** 0.5 / length.clamp_min_(1e-12)
        return torch.mul(x, scale, out=torch.empty_like(x) if out is None else out).mul_(self.gamma)


def norm_silu_conv(x: Tensor, layers: Sequence[nn.Module], cache: CausalCache) -> Tensor:
    """Apply layers that begin with a norm, then SiLU, and end with a causal convolution.

    There is one scratch tensor: the norm writes straight behind the convolution's history.
    """
    norm, conv = layers[0], layers[-1]
    assert isinstance(norm, RMSNorm) and isinstance(conv, CausalConv3d)
    padded = conv.new_padded(x)
    fresh = padded[:, :, conv.history :]
    F.silu(norm(x, out=fresh), inplace=True)
    return conv.convolve(padded, cache)


class ResidualBlock(nn.Module):
    """Two norm-SiLU-convolution steps beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),  # dropout in training; keeps the official index of what follows
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        layers = list(self.residual)
        hidden = norm_silu_conv(x, layers[:3], cache)
        hidden = norm_silu_conv(hidden, layers[3:], cache)
        return hidden.add_(self.shortcut(x))  # last, so that a projected shortcut is not held through the block


class SpatialAttention(nn.Module):
    """Single-head attention over the positions of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        num_frames, height = x.shape[2], x.shape[3]
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = rearrange(self.to_qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3)
        q, k, v = qkv.contiguous()
        attended = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(rearrange(attended, "n 1 (h w) c -> n c h w", h=height))
        return rearrange(out, "(b t) c h w -> b c t h w", t=num_frames).add_(x)


class Downsample(nn.Module):
    """Halves height and width and, if `temporal`, the number of frames (not that of the first chunk)."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), time_stride=2) if temporal else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        x = map_frames(self.resample, x.unbind(2))
        if self.time_conv is None:
            return x
        if cache.first_chunk:
            cache.remember(self.time_conv, x)
            return x
        return self.time_conv(x, cache)


class Upsample(nn.Module):
    """Doubles height and width and, if `temporal`, the number of frames (not that of the first chunk)."""

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        if self.time_conv is None or cache.first_chunk:
            return map_frames(self.resample, x.unbind(2))
        # One half of the channels is the earlier frame of each new pair, the other half the later one.
        pairs = rearrange(self.time_conv(x, cache), "b (pair c) t h w -> b c t pair h w", pair=2)
        return map_frames(self.resample, [frame for pair in pairs.unbind(2) for frame in pair.unbind(2)])


def map_frames(layers: nn.Module, frames: Sequence[Tensor]) -> Tensor:
    """Apply a 2-D stack to each frame [B, C, H, W] and join the results over time, [B, C', T, H', W'].

    One frame at a time: the enlarged input of an upsampling convolution is the largest tensor of a decoder otherwise.
    """
    first = layers(frames[0])
    b, c, h, w = first.shape
    channels_last = first.is_contiguous(memory_format=torch.channels_last)
    out = new_video(first, (b, c, len(frames), h, w), channels_last)
    out[:, :, 0] = first
    del first
    for index in range(1, len(frames)):
        out[:, :, index] = layers(frames[index])
    return out


def new_video(like: Tensor, shape: tuple[int, int, int, int, int], channels_last: bool) -> Tensor:
    """An uninitialised [B, C, T, H, W] with the device and dtype of `like`."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(shape, device=like.device, dtype=like.dtype, memory_format=layout)


class DownStage(nn.Module):
    """One resolution of the Wan 2.2 encoder: its layers beside a shortcut that folds pixels into averaged channels."""

    def __init__(
        self, layers: Sequence[nn.Module], in_dim: int, out_dim: int, time_factor: int, space_factor: int
    ) -> None:
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.out_dim, self.time_factor, self.space_factor = out_dim, time_factor, space_factor
        num_values = in_dim * time_factor * space_factor**2
        if num_values % out_dim:
            raise ValueError(
                f"a Wan 2.2 encoder stage cannot fold {in_dim} channels into {out_dim}: {num_values} values per "
                f"position do not divide by {out_dim}; choose dim_mult so that they do"
            )

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        out = x
        for layer in self.downsamples:
            out = layer(out, cache)
        return out.add_(self._averaged(x))

    def _averaged(self, x: Tensor) -> Tensor:
        missing = -x.shape[2] % self.time_factor  # the lone first frame is averaged with black, as in training
        folded = rearrange(
            F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x,
            "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w",
            ft=self.time_factor,
            fh=self.space_factor,
            fw=self.space_factor,
        )
        return folded.unflatten(1, (self.out_dim, -1)).mean(dim=2)


class UpStage(nn.Module):
    """One resolution of the Wan 2.2 decoder: its layers beside a shortcut that spreads channels over new pixels."""

    def __init__(
        self, layers: Sequence[nn.Module], in_dim: int, out_dim: int, time_factor: int, space_factor: int
    ) -> None:
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.time_factor, self.space_factor = time_factor, space_factor
        self.num_sources = in_dim // out_dim  # input channels that one output channel is spread from
        num_pixels = time_factor * space_factor**2
        if space_factor > 1 and (in_dim % out_dim or num_pixels % self.num_sources):
            raise ValueError(
                f"a Wan 2.2 decoder stage cannot spread {in_dim} channels over {out_dim} of {num_pixels} pixels each; "
                f"choose dim_mult so that {out_dim} divides {in_dim} and the quotient divides {num_pixels}"
            )

    def forward(self, x: Tensor, cache: CausalCache) -> Tensor:
        out = x
        for layer in self.upsamples:
            out = layer(out, cache)
        if self.space_factor > 1:  # the last stage keeps its resolution and has no shortcut
            self._add_spread(out, x, cache.first_chunk)
        return out

    def _add_spread(self, out: Tensor, x: Tensor, first_chunk: bool) -> None:
        # Written as one strided addition per new pixel: the enlarged shortcut never exists.
        ft, fs = self.time_factor, self.space_factor
        first = ft - 1 if first_chunk else 0  # the first chunk keeps only the last frame of what it would spread to
        repeats = ft * fs * fs // self.num_sources
        for dt in range(first, ft):
            for dh in range(fs):
                for dw in range(fs):
                    source = ((dt * fs + dh) * fs + dw) // repeats
                    target = out[:, :, dt - first :: ft - first, dh::fs, dw::fs]
                    target += x[:, source :: self.num_sources]
