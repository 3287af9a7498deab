"""What a pass over one strip of frames remembers: earlier frames, and rows of the strip above.

Frames are [B, C, rows, W], one at a time. A causal convolution sees its frame and two earlier ones, which lie side by
side in one tensor, so that it is a two-dimensional convolution over three frames' channels and no frame is ever moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fused.frame_ops import FrameOps
from ...system import words
from ...vae.strips import aligned
from .heights import find_heights
from .rows import LayerRows, Rows, StripPlan

NUM_FRAMES = 3  # that a causal convolution sees
# Of a weight, which is there in the order of each frame: there are many of so few bytes, and each takes a call to make.
KEPT_KERNEL_BYTES = 1 << 20

Write = Callable[[Tensor, Tensor], None]  # (rows, out): what a convolution sees of them, into `out`


class Borders(Protocol):
    """Where rows wait for the strip below, a step of time at a time; asked for in the same order in every strip."""

    def slot(self, num_elements: int) -> Tensor:
        """The next so many numbers of this step's, flat: what the strip above left there, to be replaced."""

    @property
    def page(self) -> Tensor:
        """All numbers of this step's, flat."""


class Rings:
    """The memory of the convolutions' last frames, which all strips use in turn."""

    def __init__(
        self, plan: StripPlan, batch: int, like: Tensor, channels_last: bool, others: Rings | None = None
    ) -> None:
        """Made before anything is recorded: what is kept here is not made again by what is played.

        `others` are some whose turn it is not: these lie in their memory where that suffices. Memory is taken as a
        strip first begins, and again after it was given back.
        """
        self._plan, self._batch, self.channels_last = plan, batch, channels_last
        self.like = batch, channels_last, like.dtype, like.device
        self.heights = find_heights(plan, batch, like, channels_last)
        convs = [layer for layer in plan.layers if isinstance(layer, nn.Conv3d)]
        self._sizes = {conv: aligned(batch * self._elements(conv, plan.layers[conv])) for conv in convs}
        self.num_elements = sum(self._sizes.values())
        self.are_guests = others is not None and others.num_elements >= self.num_elements
        self._others = others if self.are_guests else None
        self._kernels = {conv: frame_kernels(conv.weight) for conv in convs if conv.weight.nbytes <= KEPT_KERNEL_BYTES}

    @cached_property
    def memory(self) -> Tensor:
        """Flat."""
        if self._others is not None:
            return self._others.memory[: self.num_elements]
        *_, dtype, device = self.like
        return torch.empty(self.num_elements, dtype=dtype, device=device)

    @cached_property
    def _places(self) -> dict[nn.Module, Tensor]:
        return dict(zip(self._sizes, self.memory.split(list(self._sizes.values())), strict=True))

    def give_back(self) -> None:
        """Leave the memory to others; no strip has begun since it was last needed."""
        for name in ("_places", "memory"):
            self.__dict__.pop(name, None)

    def _elements(self, conv: nn.Conv3d, rows: LayerRows) -> int:
        """Numbers of one video that a convolution remembers."""
        most = max(self.heights.rows(conv, count) for count in rows.counts_out)
        return NUM_FRAMES * conv.in_channels * ring_rows(conv, most) * rows.inputs.width

    def ring(self, conv: nn.Conv3d, out_rows: int) -> FrameRing:
        """One that has seen no frame, for so many rows of a result, in memory that suffices for the thickest strip."""
        rows = ring_rows(conv, self.heights.rows(conv, out_rows))
        shape = self._batch, NUM_FRAMES * conv.in_channels, rows, self._plan.layers[conv].inputs.width
        frames = laid_out(self._places[conv], shape, self.channels_last).zero_()
        return FrameRing(frames, self._kernels.get(conv))


def ring_rows(conv: nn.Conv3d, out_rows: int) -> int:
    """Rows that a convolution sees for so many of its result."""
    return out_rows + conv.kernel_size[1] - 1


def laid_out(memory: Tensor, shape: tuple[int, int, int, int], channels_last: bool) -> Tensor:
    """The beginning of flat memory as a frame [B, C, h, w]."""
    b, c, h, w = shape
    flat = memory[: b * c * h * w]
    return flat.view(b, h, w, c).permute(0, 3, 1, 2) if channels_last else flat.view(b, c, h, w)


def copy_rows(rows: Tensor, out: Tensor) -> None:
    """Copy rows of a frame to another place of the same shape."""
    rows, out = in_words(rows, out)
    out.copy_(rows)


def in_words(*frames: Tensor) -> tuple[Tensor, ...]:
    """Frames [B, C, h, w] as the widest numbers that GPUs copy at once, where all lie channels last; else as they are.

    Copies of them are the same bits, in a third of the time where channels are 2 bytes and pixels have gaps.
    """
    return tuple(each.permute(0, 3, 1, 2) for each in words.in_words(*(each.permute(0, 2, 3, 1) for each in frames)))


class FrameRing:
    """The last frames that a causal convolution saw in one strip, the newest in the place of the oldest."""

    def __init__(self, frames: Tensor, kernels: Sequence[Tensor] | None = None) -> None:
        """`frames` are zeros [B, 3 C, rows, W]; `kernels` are those of `frame_kernels`, where they are kept."""
        self._frames, self._kernels = frames, kernels
        self._slots = frames.chunk(NUM_FRAMES, dim=1)
        self._taps: list[Tensor] = []
        self.num_seen = 0

    def next(self) -> Tensor:
        """The place [B, C, rows, W] of the next frame, whose rows outside the frame are zeros."""
        self.num_seen += 1
        return self._slots[(self.num_seen - 1) % NUM_FRAMES]

    def convolve(self, weight: Tensor) -> Tensor:
        """[B, O, rows, W] of the newest frame, without a bias; rows beyond it are part of the ring."""
        return F.conv2d(self._frames, self._kernel(weight), padding=(0, weight.shape[4] // 2))

    def _kernel(self, weight: Tensor) -> Tensor:
        number = self.num_seen % NUM_FRAMES
        if self._kernels is not None:
            return self._kernels[number]
        self._taps = self._taps or taps_of(weight)
        return frame_kernel(self._taps, number, weight.is_contiguous())


def frame_kernels(weight: Tensor) -> list[Tensor]:
    """A causal convolution's weight for the frames in a ring, by how many have been seen, of each three."""
    taps = taps_of(weight)
    return [frame_kernel(taps, number, weight.is_contiguous()) for number in range(NUM_FRAMES)]


def taps_of(weight: Tensor) -> list[Tensor]:
    """Those of [O, C, 3, h, w], each [O, C, h, w], or [O, h, w, C] as channels last lie in memory."""
    return list(weight.unbind(2) if weight.is_contiguous() else weight.permute(0, 3, 4, 1, 2).unbind(4))


def frame_kernel(taps: Sequence[Tensor], num_seen: int, as_it_is: bool) -> Tensor:
    """[O, 3 C, h, w], the taps where their frames are."""
    taps = [taps[(slot - num_seen) % NUM_FRAMES] for slot in range(NUM_FRAMES)]
    return torch.cat(taps, dim=1) if as_it_is else torch.cat(taps, dim=3).permute(0, 3, 1, 2)


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
        copy_rows(tail, self._slot[:, :, :kept])


class Strip:
    """One strip of frames on its way through a network, over the whole time. Whole frames are the only strip."""

    def __init__(
        self, plan: StripPlan, index: int, rings: Rings, ops: FrameOps, borders: Borders | None = None
    ) -> None:
        self.ops = ops
        self._plan, self._rings, self._borders = plan, rings, borders
        self._rows = {layer: rows.strip(index) for layer, rows in plan.layers.items()}
        self._running: dict[nn.Module, FrameRing] = {}
        self._num_seen: Counter[nn.Module] = Counter()
        self._set_aside: dict[nn.Module, Tensor | None] = {}

    @property
    def channels_last(self) -> bool:
        return self._rings.channels_last

    @cached_property
    def kind(self) -> Hashable:
        """What all strips have in common, of any video, that are the same work on memory of the same shapes."""
        layers = tuple(
            (type(layer).__name__, *(tuple(each.shape) for each in layer.parameters()), rows.inputs, self._rows[layer])
            for layer, rows in self._plan.layers.items()
        )
        seams = tuple(self._plan.seams.values())
        return layers, seams, self._rings.like, self.ops.name, self._borders is not None

    def begin(self) -> None:
        """Have seen no frame yet, in every layer."""
        self._running.clear()
        self._num_seen.clear()
        self._set_aside.clear()
        for layer in self._rows:
            if isinstance(layer, nn.Conv3d):
                self.ring(layer)

    @property
    def left(self) -> list[Tensor]:
        """The memory in which a step finds rows of the strip above and leaves those for the strip below."""
        return [] if self._borders is None else [self._borders.page]

    @property
    def remembered(self) -> Tensor:
        """The memory of all convolutions' last frames, flat."""
        return self._rings.memory

    def rows(self, layer: nn.Module) -> Rows:
        return self._rows[layer]

    def made_rows(self, layer: nn.Module) -> int:
        """Rows that a layer's convolution makes, of which the first are wanted."""
        return self._rings.heights.rows(layer, self.rows(layer).out)

    def joined(self, layer: nn.Module, blocks: Sequence[Tensor]) -> Tensor:
        """The first rows of blocks, for a layer's convolution of one row each; what it makes beyond is undefined."""
        wanted, rows = self.rows(layer).out, self.made_rows(layer)
        if len(blocks) == 1 and blocks[0].shape[2] >= rows:
            return blocks[0][:, :, :rows]
        frame, row = self.new_frame(blocks[0], blocks[0].shape[1], rows, blocks[0].shape[3]), 0
        for block in blocks:
            seen = block[:, :, : wanted - row]
            copy_rows(seen, frame[:, :, row : row + seen.shape[2]])
            row += seen.shape[2]
        return frame

    def count(self, layer: nn.Module) -> int:
        """How many frames a layer has seen before this one."""
        self._num_seen[layer] += 1
        return self._num_seen[layer] - 1

    def ring(self, conv: nn.Conv3d) -> FrameRing:
        """What a convolution remembers."""
        ring = self._running.get(conv)
        if ring is None:
            ring = self._running[conv] = self._rings.ring(conv, self.rows(conv).out)
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
