"""How convolutions and their frames lie: channels first or last."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_channels_last(device: torch.device, dtype: torch.dtype, hip: str | None = torch.version.hip) -> bool:
    """Whether convolutions are laid out channels last: faster and leaner where cuDNN runs them in half precision.

    (There it converts other layouts, with a copy of the activations, for each convolution.)
    """
    return device.type == "cuda" and hip is None and dtype.itemsize == 2


def lies_channels_last(x: Tensor) -> bool:
    """Whether a tensor of frames, or a convolution's weight, [O, I, (T,) h, w], has its channels last, and so alone."""
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return not x.is_contiguous() and x.is_contiguous(memory_format=layout)


def to_channels_last(weight: Tensor) -> Tensor:
    """The weight of a convolution, [O, I, (T,) h, w], channels last; any other tensor as it is."""
    if weight.ndim < 4:
        return weight
    layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    return weight.contiguous(memory_format=layout)
