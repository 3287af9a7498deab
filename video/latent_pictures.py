"""Latents as small pictures, without a decoder: good enough to see what becomes of a video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def latent_pictures(
    latent: Tensor, factors: Sequence[Sequence[float]], bias: Sequence[float] | None
) -> list[Image.Image]:
    """Each frame of a latent `[C, T, h, w]` as `h` x `w` pixels: colours are sums of its channels.

    `factors` `[C][3]` and `bias` `[3]` give -1 ... 1, as ComfyUI's `latent_formats.py` has them for each model.
    """
    frames = latent.movedim(0, -1)  # [T, h, w, C]
    rgb = torch.nn.functional.linear(
        frames, latent.new_tensor(factors).T, None if bias is None else latent.new_tensor(bias)
    )
    pixels = ((rgb + 1) / 2).clamp(0, 1).mul(255).to("cpu", torch.uint8).numpy()
    return [Image.fromarray(frame) for frame in pixels]
