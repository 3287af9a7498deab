"""Pictures as conditions: the extra latent channels of I2V models, the first latent frame of TI2V.

Source: Wan-Video/Wan2.1 `wan/image2video.py`, `wan/first_last_frame2video.py` and Wan2.2 `wan/textimage2video.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..vae.tiling import encode_fitting
from .vae.model import WanVAE


def image_channels(vae: WanVAE, first: Tensor | None, last: Tensor | None, num_frames: int) -> Tensor:
    """What I2V models see beside the noise: mask and latents of a video that is grey but for its given frames.

    `first`, `last` are `[1, 3, 1, H, W]` in -1 ... 1; returns `[1, 4 + z, T, h, w]`, fp32 on the CPU.
    The mask has a channel for each of the four frames that a latent frame stands for; the first latent frame stands
    for one, counted four times. Where the device runs out of memory the video is encoded in tiles.
    """
    given = first if first is not None else last
    if given is None:
        raise ValueError("image-to-video needs a picture: give --image, --end-image or both")
    video = torch.zeros(1, 3, num_frames, *given.shape[-2:], dtype=given.dtype, device=given.device)
    known = torch.zeros(num_frames, device=given.device)
    if first is not None:
        video[:, :, :1], known[0] = first, 1
    if last is not None:
        video[:, :, -1:], known[-1] = last, 1
    latent = encode_fitting(vae, video)
    frames = torch.cat([known[:1].repeat(vae.config.temporal_stride), known[1:]])
    mask = frames.view(-1, vae.config.temporal_stride).t()  # [4, T]
    mask = mask[None, :, :, None, None].expand(1, -1, -1, *latent.shape[-2:])
    return torch.cat([mask.to(latent), latent], dim=1)
