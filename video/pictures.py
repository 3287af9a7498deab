"""Pictures and frames as files and viewers have them, and as models do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

MOST_EXCESS = 8  # times its width or height that a picture is resized to before it is cropped


def load_image(path: Path, width: int, height: int) -> Tensor:
    """A picture cropped to the aspect and resized, `[1, 3, 1, height, width]` in -1 ... 1. ValueError if unreadable."""
    try:
        with Image.open(path) as file:
            picture = _in_colour(ImageOps.exif_transpose(file))  # upright, as a phone meant it
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such picture; give the path of a PNG, JPEG or WebP file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for bad files
        raise ValueError(f"{path}: cannot be read as a picture ({error}); give a PNG, JPEG or WebP file") from error
    scale = max(width / picture.width, height / picture.height)
    if max(picture.width * scale / width, picture.height * scale / height) > MOST_EXCESS:
        picture = _middle(picture, math.ceil(width / scale), math.ceil(height / scale))
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0)
    return pixels.permute(2, 0, 1)[None, :, None]


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    """At most so much of a picture, with a pixel more on each side for what resizing looks at."""
    left, top = max(0, (picture.width - width) // 2 - 1), max(0, (picture.height - height) // 2 - 1)
    return picture.crop((left, top, min(picture.width, left + width + 2), min(picture.height, top + height + 2)))


def _in_colour(picture: Image.Image) -> Image.Image:
    """Any picture as RGB: 16-bit grey scaled to 8, what is transparent on white."""
    if picture.mode.startswith("I"):
        grey = np.asarray(picture, dtype=np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    shown = picture.convert("RGBA")
    white = Image.new("RGBA", shown.size, "white")
    return Image.alpha_composite(white, shown).convert("RGB")


def from_uint8(video: Tensor) -> Tensor:
    """uint8 `[T, H, W, 3]` as `[1, 3, T, H, W]` in -1 ... 1."""
    return video.permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1.0)


def squeezed(picture: Tensor, size: int) -> Tensor:
    """A picture in -1 ... 1 as a square of `size` pixels, none cut off, in steps of 1/255 as its 8-bit file would have.

    As ComfyUI does it (`CLIPVisionEncode` without crop); its aspect is lost, as the model was trained.
    """
    if picture.shape[-2:] != (size, size):
        picture = F.interpolate(picture, size=(size, size), mode="bicubic", antialias=True)
    levels = ((picture + 1.0) * 127.5).clamp(0, 255).round()
    return levels / 127.5 - 1.0


def to_levels(video: Tensor) -> Tensor:
    """Numbers in -1 ... 1 as the levels of 8-bit colour, uint8, of the same shape and where they are."""
    return (video.float() + 1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_uint8(video: Tensor) -> Tensor:
    """`[1, 3, T, H, W]` in -1 ... 1, or its levels, to `[T, H, W, 3]` uint8 on the CPU.

    Frame by frame, as fp32 copies are large.
    """
    if video.dtype == torch.uint8:
        return video[0].permute(1, 2, 3, 0).contiguous().cpu()
    _, _, num_frames, height, width = video.shape
    frames = torch.empty(num_frames, height, width, 3, dtype=torch.uint8)
    for index in range(num_frames):
        frames[index] = to_levels(video[0, :, index]).permute(1, 2, 0)
    return frames
