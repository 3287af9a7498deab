"""Layers of the Wan video autoencoders that change the size of frames, and the number of them; see `blocks.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import CausalConv3d, FrameChanger
from .rows import Convolution, Level, StripPlan, seen_by_3x3
from .strip import Strip, copy_rows, in_words


class Downsample(FrameChanger):
    """Halves height and width and, if `temporal`, the number of frames (not that of the first frame)."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), time_stride=2) if temporal else None

    @property
    def _conv(self) -> nn.Conv2d:
        conv = self.resample[1]
        assert isinstance(conv, nn.Conv2d)
        return conv

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        if self.time_conv is not None:
            out = self.time_conv.plan_rows(plan, out)
            out = Level(out.ends, out.width, 2 * out.frames)
        height = 2 * out.height
        inputs = Level(tuple(min(height, 2 * end + 1) for end in out.ends), 2 * out.width, out.frames)
        plan.add(self, inputs, out, lambda row: 2 * row)
        plan.add_seam(self, self._conv.in_channels)
        channels = self._conv.in_channels, self._conv.out_channels
        plan.convolutions[self] = Convolution(*channels, (3, 3), 2, inputs.width + 1, 0)
        return inputs

    def frames(self, x: Tensor, strip: Strip) -> Iterator[Tensor]:
        halved = self._halved(x, strip)
        if self.time_conv is None:
            yield halved
            return
        number = strip.count(self)
        self.time_conv.place([halved], strip, copy_rows)
        if number == 0:
            yield halved
        elif number % 2 == 0:
            yield self.time_conv.add_bias(self.time_conv.convolve(halved, strip))

    def _halved(self, x: Tensor, strip: Strip) -> Tensor:
        conv, rows, seam = self._conv, strip.rows(self), strip.seam(self, x)
        blocks = seam.with_above(x)
        if not rows.out:
            return strip.new_frame(x, conv.out_channels, 0, x.shape[3] // 2)
        padded = strip.new_frame(x, x.shape[1], 2 * strip.made_rows(self) + 1, x.shape[3] + 1)
        padded[:, :, :, -1].zero_()
        row = 0
        for block in blocks:
            seen = block[:, :, : padded.shape[2] - row]
            copy_rows(seen, padded[:, :, row : row + seen.shape[2], :-1])
            row += seen.shape[2]
        padded[:, :, row:].zero_()
        seam.keep(blocks)
        return conv(padded)[:, :, : rows.out]


class Upsample(FrameChanger):
    """Doubles height and width and, if `temporal`, the number of frames (not that of the first frame)."""

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    @property
    def _conv(self) -> nn.Conv2d:
        conv = self.resample[1]
        assert isinstance(conv, nn.Conv2d)
        return conv

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        enlarged = seen_by_3x3(out)
        inputs = Level(tuple(-(-end // 2) for end in enlarged.ends), out.width // 2, out.frames)
        plan.add(self, inputs, out, lambda row: (row - 1) // 2)
        plan.add_seam(self, self._conv.in_channels)
        channels = self._conv.in_channels, self._conv.out_channels
        plan.convolutions[self] = Convolution(*channels, (3, 3), 1, out.width, 1)
        if self.time_conv is None:
            return inputs
        return self.time_conv.plan_rows(plan, Level(inputs.ends, inputs.width, inputs.frames // 2))

    def frames(self, x: Tensor, strip: Strip) -> Iterator[Tensor]:
        if self.time_conv is None or strip.count(self) == 0:
            yield self._doubled(x, strip)
            return
        # One half of the channels is the earlier frame of the pair, the other half the later one.
        for frame in self.time_conv(x, strip).chunk(2, dim=1):
            yield self._doubled(frame, strip)

    def _doubled(self, x: Tensor, strip: Strip) -> Tensor:
        conv, rows, seam = self._conv, strip.rows(self), strip.seam(self, x)
        blocks = seam.with_above(x)
        if not rows.out:
            return strip.new_frame(x, conv.out_channels, 0, 2 * x.shape[3])
        enlarged = strip.new_frame(x, x.shape[1], strip.made_rows(self) + 2, 2 * x.shape[3])
        row = rows.offset + 1
        for block in blocks:
            enlarge(block, row, enlarged)
            row += 2 * block.shape[2]
        seam.keep(blocks)
        if rows.is_top:
            enlarged[:, :, 0].zero_()
        if rows.is_bottom:
            enlarged[:, :, rows.out + 1].zero_()
        return F.conv2d(enlarged, conv.weight, conv.bias, padding=(0, 1))[:, :, : rows.out]


def enlarge(block: Tensor, first: int, out: Tensor) -> None:
    """Write rows of pixels, each as a square of four, into `out` [B, C, rows, 2 W], from its row `first` on.

    Rows that fall outside are left out.
    """
    block, out = in_words(block, out)
    for half in range(2):
        row = first + half
        skipped = (1 - row) // 2 if row < 0 else 0
        target = out[:, :, row + 2 * skipped :: 2]
        count = min(target.shape[2], block.shape[2] - skipped)
        if count > 0:
            squares = target[:, :, :count].unflatten(3, (-1, 2))
            squares.copy_(block[:, :, skipped : skipped + count, :, None].expand(squares.shape))
