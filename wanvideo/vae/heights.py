"""Kernels of a GPU that round alike: so many rows of a strip's convolutions that they have the bits of whole frames.

For another height cuDNN takes another kernel, and some, which share the sum of a result between several processors, add
in another order. Which those are is tried: each convolution on some numbers, of a whole frame and of fewer rows. Where
one has no such height, all stay as they are: the others would cost time, and the bits are lost all the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...system.device_errors import is_out_of_memory
from .rows import Convolution, StripPlan

logger = logging.getLogger(__name__)

MORE_ROWS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
MORE_KEPT_ROWS = (0, 1, 2, 4)  # of a convolution over frames, which are remembered
MOST_BYTES = 192 << 20  # of a whole frame's input and result: of larger ones, few rows are work enough for any kernel


class Heights:
    """How many rows a layer's convolution makes where a strip needs so many: the first are those."""

    def __init__(self, found: dict[tuple[nn.Module, int], int] | None = None) -> None:
        self._found = found or {}

    def rows(self, layer: nn.Module, needed: int) -> int:
        return self._found.get((layer, needed), needed)


@dataclass(frozen=True)
class Kind:
    """What cuDNN chooses a kernel by, beside the rows."""

    convolution: Convolution
    batch: int
    dtype: torch.dtype
    device: torch.device
    channels_last: bool


def find_heights(plan: StripPlan, batch: int, like: Tensor, channels_last: bool) -> Heights:
    """Those of a plan's strips on the device of `like`.

    On a CPU, where cuDNN times its kernels, and on AMD's GPUs, which search long for each new height, as they are.
    """
    timed = torch.backends.cudnn.benchmark
    if plan.num_strips == 1 or like.device.type != "cuda" or torch.version.hip is not None or timed:
        return Heights()
    tried = agreeing_rows.cache_info().misses
    found = try_heights(plan, batch, like, channels_last)
    if agreeing_rows.cache_info().misses > tried:
        torch.cuda.empty_cache()  # or what strips hold lies between what was left here
    return Heights(found)


def try_heights(plan: StripPlan, batch: int, like: Tensor, channels_last: bool) -> dict[tuple[nn.Module, int], int]:
    """How many rows each layer's convolution makes for so many: of all layers, or nothing where one has no height."""
    found: dict[tuple[nn.Module, int], int] = {}
    for layer, convolution in plan.convolutions.items():
        rows = plan.layers[layer]
        kind = Kind(convolution, batch, like.dtype, like.device, channels_last)
        made = _agreeing(kind, rows.outputs.height, rows.counts_out)
        if made is None:
            return {}
        found |= {(layer, few): enough for few, enough in zip(rows.counts_out, made, strict=True)}
    return found


def _agreeing(kind: Kind, whole: int, needed: tuple[int, ...]) -> tuple[int, ...] | None:
    if kind.convolution.frame_bytes(whole, kind.batch * kind.dtype.itemsize) > MOST_BYTES:
        return needed
    try:
        return agreeing_rows(kind, whole, needed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


@functools.cache
@torch.inference_mode()
def agreeing_rows(kind: Kind, whole: int, needed: tuple[int, ...]) -> tuple[int, ...] | None:
    """For each number of rows, from the least on, how many give them the bits that they have among `whole` rows.

    At most an eighth more than the largest number, which is what time and memory grow by. None where one has none.
    """
    convolution, generator = kind.convolution, torch.Generator(kind.device).manual_seed(0)
    layout = torch.channels_last if kind.channels_last else torch.contiguous_format

    def numbers(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=kind.dtype, device=kind.device, memory_format=layout)
        return made.normal_(generator=generator)

    kernel = numbers(convolution.out_channels, convolution.in_channels, *convolution.kernel)
    seen = numbers(kind.batch, convolution.in_channels, convolution.seen(whole), convolution.width)

    def made(rows: int) -> Tensor:
        part = seen[:, :, : convolution.seen(rows)].contiguous(memory_format=layout)
        return F.conv2d(part, kernel, stride=convolution.stride, padding=(0, convolution.padding))

    want = made(whole)
    more = MORE_KEPT_ROWS if convolution.is_kept else MORE_ROWS
    most, found = min(whole, needed[-1] * 9 // 8), []
    for few in needed:
        rows = _first_agreeing(made, want, few, [few + each for each in more if few + each <= most])
        if rows is None:
            logger.debug("no height gives %d rows of %d the bits of all: %s", few, whole, convolution)
            return None
        found.append(rows)
    return tuple(found)


def _first_agreeing(made: Callable[[int], Tensor], want: Tensor, few: int, heights: Sequence[int]) -> int | None:
    for rows in heights:
        if torch.equal(made(rows)[:, :, :few], want[:, :, :few]):
            return rows
    return None
