"""What a pass over one strip of frames remembers: earlier frames, and rows of the strip above.

Frames are [B, C, rows, W], one at a time. A causal convolution sees its frame and two earlier ones, which lie side by
side in one tensor, so that it is a two-dimensional convolution over three frames' channels and no frame is ever moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fused.frame_ops import FrameOps
from .rows import Rows, StripPlan

NUM_FRAMES = 3  # that a causal convolution sees

Write = Callable[[Tensor, Tensor], None]  # (rows, out): what a convolution sees of them, into `out`


class Borders(Protocol):
    """Where rows wait for the strip below, a step of time at a time; asked for in the same order in every strip."""

    def slot(self, num_elements: int) -> Tensor:
        """The next so many numbers of this step's, flat: what the strip above left there, to be replaced."""


class Rings:
    """The memory of the convolutions' last frames, which all strips use in turn."""

    def __init__(self, plan: StripPlan, batch: int, channels_last: bool) -> None:
        self._plan, self._batch, self.channels_last = plan, batch, channels_last
        self._memory: dict[nn.Module, Tensor] = {}

    def frames(self, conv: nn.Conv3d, like: Tensor, rows: int) -> Tensor:
        """Zeros [B, 3 C, rows, W] in a convolution's memory, which has room for the thickest strip."""
        channels, width = NUM_FRAMES * conv.in_channels, like.shape[3]
        memory = self._memory.get(conv)
        if memory is None:
            most = ring_rows(conv, self._plan.layers[conv].most_out)
            memory = self._memory[conv] = like.new_empty(self._batch * channels * most * width)
        return laid_out(memory, (self._batch, channels, rows, width), self.channels_last).zero_()


def ring_rows(conv: nn.Conv3d, out_rows: int) -> int:
    """Rows that a convolution sees for so many of its result."""
    return out_rows + conv.kernel_size[1] - 1


def laid_out(memory: Tensor, shape: tuple[int, int, int, int], channels_last: bool) -> Tensor:
    """The beginning of flat memory as a frame [B, C, h, w]."""
    b, c, h, w = shape
    flat = memory[: b * c * h * w]
    return flat.view(b, h, w, c).permute(0, 3, 1, 2) if channels_last else flat.view(b, c, h, w)


class FrameRing:
    """The last frames that a causal convolution saw in one strip, the newest in the place of the oldest."""

    def __init__(self, frames: Tensor) -> None:
        self._frames = frames
        self._channels = frames.shape[1] // NUM_FRAMES
        self._num_seen = 0

    def next(self) -> Tensor:
        """The place [B, C, rows, W] of the next frame, whose rows outside the frame are zeros."""
        slot = self._num_seen % NUM_FRAMES
        self._num_seen += 1
        return self._frames[:, slot * self._channels : (slot + 1) * self._channels]

    def convolve(self, weight: Tensor) -> Tensor:
        """[B, O, rows, W] of the newest frame, without a bias; rows beyond it are part of the ring."""
        return F.conv2d(self._frames, self._kernel(weight), padding=(0, weight.shape[4] // 2))

    def _kernel(self, weight: Tensor) -> Tensor:
        """[O, C, 3, h, w] as [O, 3 C, h, w], its taps where their frames are."""
        order = [(slot - self._num_seen) % NUM_FRAMES for slot in range(NUM_FRAMES)]
        if weight.is_contiguous():
            return torch.stack([weight[:, :, tap] for tap in order], dim=1).flatten(1, 2)
        taps = weight.permute(0, 3, 4, 2, 1)  # as channels last lies in memory
        return torch.stack([taps[:, :, :, tap] for tap in order], dim=3).flatten(3).permute(0, 3, 1, 2)


class Seam:
    """The input rows of one layer and one frame between a strip and its neighbours."""

    def __init__(self, rows: Rows, slot: Tensor | None) -> None:
        self._rows, self._slot = rows, slot

    def with_above(self, x: Tensor) -> list[Tensor]:
        """The rows of the frame from the first that is needed on, in blocks from the top down."""
        blocks = [] if self._slot is None or not self._rows.above else [self._slot[:, :, : self._rows.above]]
        return [*blocks, x] if x.shape[2] else blocks

    def keep(self, blocks: Sequence[Tensor]) -> None:
        """Leave the last rows of `blocks` to the strip below, and nothing of what the strip above left."""
        kept = self._rows.kept
        if self._slot is None or not kept:
            return
        tail = blocks[-1][:, :, -kept:]
        if len(blocks) > 1 and tail.shape[2] < kept:
            tail = torch.cat([block[:, :, -kept:] for block in blocks], dim=2)[:, :, -kept:]
        elif tail.untyped_storage().data_ptr() == self._slot.untyped_storage().data_ptr():
            tail = tail.clone()  # of what is about to be written over
        self._slot[:, :, :kept].copy_(tail)


class Strip:
    """One strip of frames on its way through a network, over the whole time. Whole frames are the only strip."""

    def __init__(
        self, plan: StripPlan, index: int, rings: Rings, ops: FrameOps, borders: Borders | None = None
    ) -> None:
        self.ops = ops
        self._plan, self._index, self._rings, self._borders = plan, index, rings, borders
        self._running: dict[nn.Module, FrameRing] = {}
        self._num_seen: Counter[nn.Module] = Counter()
        self._set_aside: dict[nn.Module, Tensor | None] = {}

    @property
    def channels_last(self) -> bool:
        return self._rings.channels_last

    def rows(self, layer: nn.Module) -> Rows:
        return self._plan.layers[layer].strip(self._index)

    def count(self, layer: nn.Module) -> int:
        """How many frames a layer has seen before this one."""
        self._num_seen[layer] += 1
        return self._num_seen[layer] - 1

    def ring(self, conv: nn.Conv3d, like: Tensor) -> FrameRing:
        """What a convolution remembers, of frames as wide as `like`."""
        ring = self._running.get(conv)
        if ring is None:
            rows = ring_rows(conv, self.rows(conv).out)
            ring = self._running[conv] = FrameRing(self._rings.frames(conv, like, rows))
        return ring

    def swap(self, layer: nn.Module, frame: Tensor | None) -> Tensor | None:
        """What a layer wanted to find again when it last called this."""
        before = self._set_aside.get(layer)
        self._set_aside[layer] = frame
        return before

    def has_seam(self, layer: nn.Module) -> bool:
        return layer in self._plan.seams

    def seam(self, layer: nn.Module, like: Tensor) -> Seam:
        """Rows of a layer's input, whose frames are like `like`; to be asked for once for each frame."""
        rows, seam = self.rows(layer), self._plan.seams[layer]
        if self._borders is None or not seam.rows:
            return Seam(rows, None)
        shape = like.shape[0], seam.channels, seam.rows, seam.width
        memory = self._borders.slot(shape[0] * seam.channels * seam.rows * seam.width)
        return Seam(rows, laid_out(memory, shape, self.channels_last))

    def new_frame(self, like: Tensor, channels: int, rows: int, width: int) -> Tensor:
        """An uninitialised frame in the strip's layout."""
        shape = like.shape[0], channels, rows, width
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, device=like.device, dtype=like.dtype, memory_format=layout)
