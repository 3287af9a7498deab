"""Colours of the small video given to the large one.

Source: FlashVSR (OpenImagingLab/FlashVSR, `diffsynth/pipelines/flashvsr_tiny.py`); AdaIN by Huang and Belongie 2017
(arXiv:1703.06868), the wavelet fix by StableSR (Wang et al. 2023, arXiv:2305.07015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 5  # of the blur, each twice as wide as the last
EPS = 1e-5


def match_statistics(frame: Tensor, small: Tensor) -> Tensor:
    """`frame` with the mean and deviation of each of `small`'s channels; both `[3, H, W]` fp32."""
    mean, std = _statistics(frame)
    wanted_mean, wanted_std = _statistics(small)
    return (frame - mean) / std * wanted_std + wanted_mean


def match_low_frequencies(frame: Tensor, small: Tensor) -> Tensor:
    """`frame` with its blurred colours replaced by those of `small`; both `[3, H, W]` fp32."""
    return frame - _blurred(frame) + _blurred(small)


def unchanged(frame: Tensor, small: Tensor) -> Tensor:
    """The frame as it is."""
    return frame


COLOUR_FIXES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "adain": match_statistics,
    "wavelet": match_low_frequencies,
    "none": unchanged,
}


def _statistics(frame: Tensor) -> tuple[Tensor, Tensor]:
    flat = frame.flatten(1)
    std = (flat.var(1, unbiased=False) + EPS).sqrt()
    return flat.mean(1)[:, None, None], std[:, None, None]


def _blurred(frame: Tensor) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25], dtype=frame.dtype, device=frame.device)
    kernel = (line[:, None] * line).expand(frame.shape[0], 1, 3, 3)
    low = frame[None]
    for level in range(LEVELS):
        away = 2**level
        low = F.conv2d(F.pad(low, (away,) * 4, "replicate"), kernel, dilation=away, groups=frame.shape[0])
    return low[0]
