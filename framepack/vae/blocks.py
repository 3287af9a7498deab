"""Layers of the HunyuanVideo autoencoder, each run over a clip frame by frame.

A convolution sees its frame and the two before it, a group norm the whole clip, the attention all frames up to its
own. So every layer goes through its clip once, in order of time: an input frame is normalised into a ring of three
and freed, unless a shortcut needs it. The result is the network's over the whole clip; what exists at a time is the
clip between two layers, the ring and one frame.

Parameter names are those of diffusers' AutoencoderKLHunyuanVideo.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...vae.layouts import lies_channels_last
from .frames import Clip

WriteFrame = Callable[[Tensor, Tensor], None]  # (frame, out): what a convolution sees of a frame, into `out`

NORM_EPS = 1e-6
MAX_SCORES = 2**28  # attention scores at a time, where a kernel holds them all


class FrameRing:
    """The last `num_frames` input frames of a causal convolution, replicated outwards by a pixel, side by side.

    The frames lie in one tensor [B, num_frames * C, h+2, w+2], frame `i` in slot `i % num_frames`: the convolution
    over time becomes one over more channels, and no frame is moved. Before the video its first frame is repeated.
    """

    def __init__(self, num_frames: int, channels_last: bool) -> None:
        self.num_frames = num_frames
        self.num_pushed = 0
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._frames: Tensor | None = None

    @property
    def frames(self) -> Tensor:
        assert self._frames is not None
        return self._frames

    def push(self, frame: Tensor, write: WriteFrame | None = None) -> None:
        """Let `frame` [B, C, h, w] take the place of the oldest, as it is or as `write` makes it."""
        b, c, h, w = frame.shape
        first = self._frames is None
        if first:
            self._frames = empty_frame(frame, (b, self.num_frames * c, h + 2, w + 2), self._layout)
        slots = [self.frames[:, slot * c : (slot + 1) * c] for slot in range(self.num_frames)]
        padded = slots[self.num_pushed % self.num_frames]
        inside = padded[:, :, 1:-1, 1:-1]
        if write is None:
            inside.copy_(frame)
        else:
            write(frame, inside)
        padded[:, :, 0, 1:-1] = padded[:, :, 1, 1:-1]
        padded[:, :, -1, 1:-1] = padded[:, :, -2, 1:-1]
        padded[:, :, :, 0] = padded[:, :, :, 1]
        padded[:, :, :, -1] = padded[:, :, :, -2]
        if first:
            for slot in slots[1:]:
                slot.copy_(padded)
        self.num_pushed += 1

    def rotated(self, weight: Tensor) -> list[Tensor]:
        """A kernel [O, C, frames, kh, kw] as 2-D kernels, one for each slot that the newest frame may lie in."""
        n = self.num_frames
        orders = [[(slot - newest - 1) % n for slot in range(n)] for newest in range(n)]
        return [weight[:, :, order].transpose(1, 2).flatten(1, 2).contiguous(memory_format=self._layout)
                for order in orders]  # fmt: skip

    def convolve(self, kernels: list[Tensor], bias: Tensor | None, stride: int = 1) -> Tensor:
        """Convolve what the ring holds with the kernel, of `rotated`, that fits its newest frame."""
        kernel = kernels[(self.num_pushed - 1) % self.num_frames]
        return F.conv2d(self.frames, kernel, bias, stride)


class CausalConv3d(nn.Module):
    """A 3x3x3 convolution padded by replication, in time with earlier frames only; strides as (time, space)."""

    def __init__(self, in_channels: int, out_channels: int, time_stride: int = 1, space_stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3)
        self.time_stride, self.space_stride = time_stride, space_stride

    def start(self) -> ConvPass:
        """Begin a clip."""
        return ConvPass(self)

    def read(self, video: Tensor, clip: Clip) -> Clip:
        """Convolve `video` [B, C, T, h, w], which may lie elsewhere, into a clip in the store of `clip`."""
        out, running = clip.fresh(), self.start()
        for frame in video.unbind(2):
            out.append(running.push(frame.to(self.conv.weight.device, self.conv.weight.dtype))[0])
        return out

    def resample(self, clip: Clip) -> Clip:
        """Convolve the frames of `clip`, which loses them."""
        out, running = clip.fresh(), self.start()
        for index in range(len(clip)):
            for frame in running.push(clip.take(index)):
                out.append(frame)
        return out

    def finish(self, clip: Clip, norm: nn.GroupNorm) -> Tensor:
        """Normalise, activate and convolve the frames of `clip`, which loses them, into [B, O, T, h, w]."""
        running, write = self.start(), clip.group_norm(norm).write
        return torch.stack([running.push(clip.take(index), write)[0] for index in range(len(clip))], dim=2)


class ConvPass:
    """A convolution on its way through one clip."""

    def __init__(self, layer: CausalConv3d) -> None:
        self._layer = layer
        self._ring = FrameRing(3, lies_channels_last(layer.conv.weight))
        self._kernels = self._ring.rotated(layer.conv.weight)

    def push(self, frame: Tensor, write: WriteFrame | None = None) -> list[Tensor]:
        """Show the next frame; the output frame, or none where a stride leaves it out."""
        index = self._ring.num_pushed
        self._ring.push(frame, write)
        del frame
        if index % self._layer.time_stride:
            return []
        return [self._ring.convolve(self._kernels, self._layer.conv.bias, self._layer.space_stride)]


class ResidualBlock(nn.Module):
    """Two norm-SiLU-convolution steps beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = PointwiseConv(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, clip: Clip) -> Clip:
        hidden, shortcut = self._first_half(clip)
        out, running = clip.fresh(), self.conv2.start()
        write = hidden.group_norm(self.norm2).write
        for index in range(len(hidden)):
            for frame in running.push(hidden.take(index), write):
                out.append(frame.add_(shortcut.take(index)))
        return out

    def _first_half(self, clip: Clip) -> tuple[Clip, Clip]:
        hidden, running = clip.fresh(), self.conv1.start()
        write = clip.group_norm(self.norm1).write
        if self.conv_shortcut is None:
            for index in range(len(clip)):
                hidden.append(running.push(clip.load(index), write)[0])
            return hidden, clip
        # The projected shortcut takes the place of its frame: together they are no larger where channels halve.
        shortcut = clip.fresh()
        for index in range(len(clip)):
            frame = clip.take(index)
            (convolved,) = running.push(frame, write)
            projected = self.conv_shortcut(frame)
            del frame
            hidden.append(convolved)
            shortcut.append(projected)
            del convolved, projected
        return hidden, shortcut


class PointwiseConv(nn.Module):
    """A 1x1x1 convolution of frames [B, C, h, w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, frame: Tensor) -> Tensor:
        return F.conv2d(frame, self.conv.weight[..., 0], self.conv.bias)


class CausalAttention(nn.Module):
    """Single-head attention over the positions of a frame and of all frames before it."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, dim, eps=NORM_EPS)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, clip: Clip) -> Clip:
        out, norm = clip.fresh(), clip.group_norm(self.group_norm)
        keys: Tensor | None = None
        for index in range(len(clip)):
            frame = clip.take(index)
            b, c, h, w = frame.shape
            tokens = norm.normalise(frame, torch.empty_like(frame)).flatten(2).transpose(1, 2)
            if keys is None:
                keys, values = tokens.new_empty((2, b, 1, len(clip) * h * w, c))
            start, end = index * h * w, (index + 1) * h * w
            keys[:, 0, start:end] = self.to_k(tokens)
            values[:, 0, start:end] = self.to_v(tokens)
            # Later frames are not there yet, so no mask is needed.
            attended = attend(self.to_q(tokens)[:, None], keys[:, :, :end], values[:, :, :end])
            projected = self.to_out[0](attended[:, 0]).transpose(1, 2).unflatten(2, (h, w))
            out.append(frame + projected)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, 1, L, C] to k and v, in pieces so that all scores of a piece fit where a kernel needs them."""
    rows = max(MAX_SCORES // (k.shape[0] * k.shape[2]), 1)
    return torch.cat([F.scaled_dot_product_attention(piece, k, v) for piece in q.split(rows, dim=2)], dim=2)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the resolution of the latent."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim, num_groups) for _ in range(2)])
        self.attentions = nn.ModuleList([CausalAttention(dim, num_groups)])

    def forward(self, clip: Clip) -> Clip:
        for layer in (self.resnets[0], self.attentions[0], self.resnets[1]):
            clip = layer(clip)
        return clip


class Stage(nn.Module):
    """One resolution: residual blocks, then what changes it, which the last has not."""

    def __init__(self, in_dim: int, dim: int, num_blocks: int, num_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(dim if number else in_dim, dim, num_groups) for number in range(num_blocks)
        )

    def samplers(self) -> nn.ModuleList:
        """None, or the one layer that changes the resolution."""
        raise NotImplementedError

    def forward(self, clip: Clip) -> Clip:
        for block in self.resnets:
            clip = block(clip)
        for sampler in self.samplers():
            # Frames of another size follow. PyTorch's allocator keeps freed memory in pieces of the old one, a third on
            # top of what is in use.
            torch.cuda.empty_cache()
            clip = sampler(clip)
            torch.cuda.empty_cache()
        return clip


class DownStage(Stage):
    """One resolution of the encoder; `temporal` is None at the last, which does not change it."""

    def __init__(self, in_dim: int, dim: int, num_blocks: int, num_groups: int, temporal: bool | None) -> None:
        super().__init__(in_dim, dim, num_blocks, num_groups)
        self.downsamplers = nn.ModuleList([] if temporal is None else [Downsample(dim, temporal)])

    def samplers(self) -> nn.ModuleList:
        return self.downsamplers


class UpStage(Stage):
    """One resolution of the decoder; `temporal` is None at the last, which does not change it."""

    def __init__(self, in_dim: int, dim: int, num_blocks: int, num_groups: int, temporal: bool | None) -> None:
        super().__init__(in_dim, dim, num_blocks, num_groups)
        self.upsamplers = nn.ModuleList([] if temporal is None else [Upsample(dim, temporal)])

    def samplers(self) -> nn.ModuleList:
        return self.upsamplers


class Downsample(nn.Module):
    """Halves height and width and, if `temporal`, the frames after the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.conv = CausalConv3d(dim, dim, time_stride=2 if temporal else 1, space_stride=2)

    def forward(self, clip: Clip) -> Clip:
        return self.conv.resample(clip)


class Upsample(nn.Module):
    """Repeats pixels to twice the height and width and, if `temporal`, frames (but the first), then convolves.

    A kernel over repeated pixels sees only two different ones per direction, so its taps are added up beforehand: four
    2x2 kernels (one per new pixel of a square) over the frames as they are, and for repeated frames two of two
    frames. That is the same result, up to the rounding of the sums, for 8/27 of the work, and the enlarged input never
    exists. Replicated borders repeat just so.
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.conv = CausalConv3d(dim, dim)
        self.temporal = temporal

    def forward(self, clip: Clip) -> Clip:
        ring = FrameRing(2 if self.temporal else 3, lies_channels_last(self.conv.conv.weight))
        assert self.conv.conv.bias is not None
        kernels, bias = self._kernels(ring), self.conv.conv.bias.repeat(4)
        out = clip.fresh()
        for index in range(len(clip)):
            ring.push(clip.take(index))
            for number in range(1 if self.temporal and index == 0 else 0, len(kernels)):
                out.append(self._enlarged(ring.convolve(kernels[number], bias)))
        return out

    def _kernels(self, ring: FrameRing) -> list[list[Tensor]]:
        """For each new frame of a frame: kernels that make the four pixels of a square, for `ring.convolve`."""
        weight = self.conv.conv.weight
        squares = fold_square(weight.float())
        # Of two equal frames, the first sees the pair before twice and itself; the second sees that pair once.
        timed = fold_pairs(squares, dim=2)[::-1] if self.temporal else [squares]
        return [ring.rotated(kernel.to(weight.dtype)) for kernel in timed]

    def _enlarged(self, phases: Tensor) -> Tensor:
        """Weave [B, 4 C, h+1, w+1], four pixels of a square in channels, into a frame [B, C, 2h, 2w]."""
        b, c, h, w = phases.shape[0], phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
        layout = torch.channels_last if lies_channels_last(self.conv.conv.weight) else torch.contiguous_format
        frame = empty_frame(phases, (b, c, 2 * h, 2 * w), layout)
        for number in range(4):
            y, x = divmod(number, 2)
            # The lower and right pixels look one position further.
            frame[:, :, y::2, x::2] = phases[:, number * c : (number + 1) * c, y : y + h, x : x + w]
        return frame


def fold_pairs(weight: Tensor, dim: int) -> list[Tensor]:
    """A kernel of three taps over values that come in pairs, as two kernels of two taps over the values.

    The one centred on the first of a pair sees the pair before once and its own twice; that on the second sees its own
    twice and the next once.
    """
    first, middle, last = weight.unbind(dim)
    return [torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)]


def fold_square(weight: Tensor) -> Tensor:
    """[O, C, t, 3, 3] -> [4 O, C, t, 2, 2]: the kernels of a square's pixels, row by row."""
    return torch.cat([phase for rows in fold_pairs(weight, dim=3) for phase in fold_pairs(rows, dim=4)])


def empty_frame(like: Tensor, shape: tuple[int, int, int, int], layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=like.dtype, memory_format=layout)
