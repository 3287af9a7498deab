"""Frames of the small video as FlashVSR sees them, and those that it makes as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from ...video.pictures import to_levels
from .colour import COLOUR_FIXES


def enlarged(frame: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """A frame uint8 `[h, w, 3]` as `[3, H, W]` in -1 ... 1, in levels of 8-bit colour as the published pipeline has it.

    Bicubic, to `size` (width, height); its edge is repeated up to `padded`.
    """
    picture = frame.permute(2, 0, 1)[None].float()
    # with antialias PyTorch's kernel is Pillow's
    picture = F.interpolate(picture, size=(size[1], size[0]), mode="bicubic", antialias=True)
    picture = picture.round_().clamp_(0, 255).div_(127.5).sub_(1)
    beyond = (0, padded[0] - size[0], 0, padded[1] - size[1])
    return F.pad(picture, beyond, "replicate")[0] if any(beyond) else picture[0]


def coloured(frames: Tensor, small: Tensor, colour: str, size: tuple[int, int]) -> Tensor:
    """`[1, 3, t, H, W]`, about 0 to 1, as pictures uint8 `[t, h, w, 3]` on the CPU, without what was padded.

    They get the colours of `small`, of the same shape in -1 ... 1.
    """
    fix, (width, height) = COLOUR_FIXES[colour], size
    out = torch.empty(frames.shape[2], height, width, 3, dtype=torch.uint8)
    for index in range(frames.shape[2]):
        made, shown = (each[0, :, index, :height, :width].float() for each in (frames, small))
        out[index] = to_levels(fix(made * 2 - 1, shown)).permute(1, 2, 0)
    return out


def in_order(pieces: Iterator[Tensor], first: int) -> Iterator[Tensor]:
    """Frame after frame of `[t, h, w, 3]` pieces, from number `first` on."""
    return islice(chain.from_iterable(pieces), first, None)
