"""The steps between the convolutions of a video autoencoder, in plain PyTorch."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class FrameOps(Protocol):
    """Steps on frames [B, C, h, w]; vectors are [C]. A convolution's bias is added by the step that reads its result.

    Every sum and product is rounded to the dtype of the frames, as one PyTorch call after another would.
    """

    @property
    def name(self) -> str: ...

    def norm_silu(self, x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor) -> None:
        """SiLU of `x` + `bias`, divided by its root mean square over the channels, times `gamma`, into `out`.

        The mean is taken in float32 (Zhang and Sennrich, arXiv:1910.07467). `x` may be lost.
        """

    def add_(self, x: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None) -> None:
        """(`x` + `bias`) + (`other` + `other_bias`) in place of `x`; `other` may be lost."""


class EagerFrameOps:
    """PyTorch's own operations: the reference, and what runs off the GPU."""

    name = "eager"

    def norm_silu(self, x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor) -> None:
        if bias is not None:
            x = x.add_(bias.view(-1, 1, 1))
        rms_norm(x, gamma.view(-1, 1, 1), out)
        F.silu(out, inplace=True)

    def add_(self, x: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None) -> None:
        if bias is not None:
            x.add_(bias.view(-1, 1, 1))
        if other_bias is not None:
            other.add_(other_bias.view(-1, 1, 1))
        x.add_(other)


def rms_norm(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """`x` [B, C, ...] over its root mean square over the channels, times `gamma`; the sum is taken in float32."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = x.shape[1] ** 0.5 / length.clamp_min_(1e-12)
    return torch.mul(x, scale, out=torch.empty_like(x) if out is None else out).mul_(gamma)
