"""Pictures as conditions: the extra latent channels of I2V models, the first latent frame of TI2V.

Source: Wan-Video/Wan2.1 `wan/image2video.py`, `wan/first_last_frame2video.py` and Wan2.2 `wan/textimage2video.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .vae import WanVAE


def load_image(path: Path, width: int, height: int) -> Tensor:
    """A picture cropped to the aspect and resized, `[1, 3, 1, height, width]` in -1 ... 1. ValueError if unreadable."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")  # upright, as a phone meant it
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such picture; give the path of a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for bad files
        raise ValueError(f"{path}: cannot be read as a picture ({error}); give a PNG, JPEG or WebP file") from error
    scale = max(width / picture.width, height / picture.height)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0)
    return pixels.permute(2, 0, 1)[None, :, None]


def image_channels(vae: WanVAE, first: Tensor | None, last: Tensor | None, num_frames: int) -> Tensor:
    """What I2V models see beside the noise: mask and latents of a video that is grey but for its given frames.

    `first`, `last` are `[1, 3, 1, H, W]` in -1 ... 1; returns `[1, 4 + z, T, h, w]`. The mask has a channel for each
    of the four frames that a latent frame stands for; the first latent frame stands for one, counted four times.
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
    latent = vae.encode(video)
    frames = torch.cat([known[:1].repeat(vae.config.temporal_stride), known[1:]])
    mask = frames.view(-1, vae.config.temporal_stride).t()  # [4, T]
    mask = mask[None, :, :, None, None].expand(1, -1, -1, *latent.shape[-2:])
    return torch.cat([mask.to(latent), latent], dim=1)
