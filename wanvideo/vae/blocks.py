"""Layers of the Wan video autoencoders: causal convolutions, norms, resampling, shortcuts.

A layer sees one frame [B, C, rows, W] at a time, in order of time, and of that frame the rows of one strip, which may
be all of it. What it needs of earlier frames and of the strip above is in a `Strip`, never in a module. Layers that
change the number of frames yield them. `plan_rows` says which rows a layer needs for those wanted of it.
Parameter names are those of Wan-Video `wan/modules/vae2_1.py` and `vae2_2.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...fused.frame_ops import rms_norm
from .rows import Convolution, Level, StripPlan, seen_by_3x3
from .strip import NUM_FRAMES, Seam, Strip, Write, copy_rows


class FrameChanger(nn.Module):
    """A layer that changes the number of frames."""

    def frames(self, x: Tensor, strip: Strip) -> Iterator[Tensor]:
        """What one frame [B, C, rows, W] leads to."""
        raise NotImplementedError


def plan_layers(layers: Sequence[nn.Module], plan: StripPlan, out: Level) -> Level:
    """What the first of `layers` needs for the last to make `out`."""
    for layer in reversed(layers):
        out = layer.plan_rows(plan, out)  # type: ignore[operator]
        if isinstance(layer, CausalConv3d):  # in no block that keeps rows for it
            plan.add_seam(layer, layer.in_channels)
    return out


def frames_through(layers: Sequence[nn.Module], x: Tensor, strip: Strip) -> Iterator[Tensor]:
    """What comes of a frame behind all the layers, each frame all the way through before the next."""
    for index, layer in enumerate(layers):
        if isinstance(layer, FrameChanger):
            for frame in layer.frames(x, strip):
                yield from frames_through(layers[index + 1 :], frame, strip)
            return
        x = layer(x, strip)
    yield x


class CausalConv3d(nn.Conv3d):
    """A convolution over a frame and the two before it; zeros stand for what is before the first, and at the edges."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, (time_stride, 1, 1), (0, kernel[1] // 2, kernel[2] // 2))

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # has no numbers to draw
            super().reset_parameters()

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        _, *kernel = self.kernel_size
        channels = NUM_FRAMES * self.in_channels, self.out_channels
        plan.convolutions[self] = Convolution(*channels, (kernel[0], kernel[1]), 1, out.width, kernel[1] // 2, True)
        if self.kernel_size[1] == 1:
            return plan.add(self, out, out)
        return plan.add(self, seen_by_3x3(out), out, lambda row: row - 1)

    # Every layer takes the strip, a convolution too.
    def forward(self, x: Tensor, strip: Strip) -> Tensor:  # type: ignore[override]
        """The frame's convolution with its bias, of rows as they are."""
        out = self.see([x], strip, copy_rows, strip.seam(self, x) if strip.has_seam(self) else None)
        return self.add_bias(out)

    def add_bias(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return x.add_(self.bias.view(-1, 1, 1))

    def see(self, blocks: Sequence[Tensor], strip: Strip, write: Write, seam: Seam | None = None) -> Tensor:
        """The convolution, without its bias, of a frame that comes in blocks of rows, top down; see `place`."""
        self.place(blocks, strip, write, seam)
        return self.convolve(blocks[0], strip)

    def place(self, blocks: Sequence[Tensor], strip: Strip, write: Write, seam: Seam | None = None) -> None:
        """Show the next frame, in blocks of rows that `write` brings to their place.

        With a seam, rows as the convolution sees them are kept from strip to strip, and `blocks` are the new ones.
        """
        rows = strip.rows(self)
        if not rows.out:
            return
        slot = strip.ring(self).next()
        first = row = rows.offset + self.kernel_size[1] // 2
        if seam is not None:
            for above in seam.with_above(blocks[0][:, :, :0]):
                copy_rows(above, slot[:, :, row : row + above.shape[2]])
                row += above.shape[2]
        for block in blocks:
            if block.shape[2]:
                write(block, slot[:, :, row : row + block.shape[2]])
                row += block.shape[2]
        if seam is not None:
            seam.keep([slot[:, :, first:row]])

    def convolve(self, like: Tensor, strip: Strip) -> Tensor:
        """The convolution of the frame that was placed last, and those before it."""
        if not strip.rows(self).out:
            return strip.new_frame(like, self.out_channels, 0, like.shape[3])
        return strip.ring(self).convolve(self.weight)[:, :, : strip.rows(self).out]


class RMSNorm(nn.Module):
    """Divides by the root mean square over the channels (dim 1), at each position; the sum is taken in float32."""

    def __init__(self, dim: int, num_spatial_dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)

    def activation(self, strip: Strip, bias: Tensor | None = None) -> Write:
        """The norm of rows (+ `bias`) and SiLU, for a convolution to see."""
        gamma = self.gamma.flatten()

        def write(rows: Tensor, out: Tensor) -> None:
            strip.ops.norm_silu(rows, bias, gamma, out)

        return write


class ResidualBlock(nn.Module):
    """Two norm-SiLU-convolution steps beside a shortcut, for which rows of the input are kept."""

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

    @property
    def _steps(self) -> tuple[RMSNorm, CausalConv3d, RMSNorm, CausalConv3d]:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        return norm1, conv1, norm2, conv2  # type: ignore[return-value]

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        _, conv1, _, conv2 = self._steps
        middle = conv2.plan_rows(plan, out)
        plan.add_seam(conv2, conv2.in_channels)
        plan.add(self, conv1.plan_rows(plan, middle), out)
        plan.add_seam(self, conv1.in_channels)
        if not isinstance(self.shortcut, nn.Identity):
            plan.convolutions[self] = Convolution(conv1.in_channels, conv1.out_channels, (1, 1), 1, out.width, 0)
        return plan.layers[self].inputs

    def forward(self, x: Tensor, strip: Strip) -> Tensor:
        norm1, conv1, norm2, conv2 = self._steps
        seam = strip.seam(self, x)
        blocks = seam.with_above(x) or [x]
        # The rows above are kept as they came: they are normed again, which is no convolution, and not kept twice.
        hidden = conv1.see(blocks, strip, norm1.activation(strip))
        inner = strip.seam(conv2, hidden)
        hidden = conv2.see([hidden], strip, norm2.activation(strip, conv1.bias), inner)
        row, bias = 0, self.shortcut.bias if isinstance(self.shortcut, nn.Conv3d) else None
        for block in self._shortcut(blocks, strip):
            rows = hidden[:, :, row : row + block.shape[2]]
            if rows.shape[2]:
                strip.ops.add_(rows, conv2.bias, block[:, :, : rows.shape[2]], bias)
            row += block.shape[2]
        seam.keep(blocks)
        return hidden

    def _shortcut(self, blocks: Sequence[Tensor], strip: Strip) -> Sequence[Tensor]:
        """What is added to the rows, from the first on, without a bias: no fewer than there are."""
        if isinstance(self.shortcut, nn.Identity) or not strip.rows(self).out:
            return blocks
        return [F.conv2d(strip.joined(self, blocks), self.shortcut.weight[:, :, 0])]


class Head(nn.Sequential):
    """Norm, SiLU and the last convolution."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_channels, (3, 3, 3)))

    @property
    def _steps(self) -> tuple[RMSNorm, CausalConv3d]:
        norm, _, conv = self
        return norm, conv  # type: ignore[return-value]

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        _, conv = self._steps
        inputs = conv.plan_rows(plan, out)
        plan.add_seam(conv, conv.in_channels)
        return inputs

    def forward(self, x: Tensor, strip: Strip) -> Tensor:  # type: ignore[override]
        norm, conv = self._steps
        return conv.add_bias(conv.see([x], strip, norm.activation(strip), strip.seam(conv, x)))


class SpatialAttention(nn.Module):
    """Single-head attention over the positions of each frame, which is whole."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        assert len(out.ends) == 1, "attention sees whole frames"
        return out

    def forward(self, x: Tensor, strip: Strip) -> Tensor:
        height = x.shape[2]
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n (three c) h w -> three n 1 (h w) c", three=3).contiguous()
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(attended, "n 1 (h w) c -> n c h w", h=height)).add_(x)
