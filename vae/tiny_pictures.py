"""Latents as small pictures by a tiny decoder: what becomes of a video, seen while it is made."""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ..video.pictures import to_levels
from .files import OpenVae
from .tiny import TinyConfig, TinyVAE

PICTURES_PER_LATENT = 2  # of the four frames that a decoder makes of one

Opened = OpenVae[TinyConfig, TinyVAE]


def in_ram(opened: Opened) -> Opened:
    """The same with the decoder's tensors read, to be brought to a device again and again."""
    names = [name for name in opened.checkpoint.tensors if name.startswith(opened.format.decoder)]
    return replace(opened, tensors={name: opened.checkpoint.read(name) for name in names})


def small_latent(latent: Tensor, config: TinyConfig, longest_side: int) -> Tensor:
    """A latent `[1, C, T, h, w]` in fp32, averaged down until its pictures have at most so many pixels a side."""
    most, side = max(1, longest_side // config.spatial_stride), max(latent.shape[3:])
    if side <= most:
        return latent.float()
    height, width = (max(1, round(each * most / side)) for each in latent.shape[3:])
    frames = latent[0].float().movedim(1, 0)  # [T, C, h, w]
    return torch.nn.functional.interpolate(frames, (height, width), mode="area").movedim(0, 1)[None]


def bytes_needed(opened: Opened, latent: Tensor, dtype: torch.dtype) -> int:
    """What `tiny_pictures` takes of the latent's device, weights included."""
    frames, height, width = latent.shape[2:]
    side = opened.config.spatial_stride
    pixels = frames * PICTURES_PER_LATENT * height * width * side**2 * 3
    working = opened.config.decode_bytes(height * side, width * side, dtype.itemsize)
    return opened.weight_bytes(dtype, only="decoder") + working + 2 * pixels + 2 * latent.nbytes


def tiny_pictures(opened: Opened, latent: Tensor, dtype: torch.dtype) -> list[Image.Image]:
    """Pictures of a latent `[1, C, T, h, w]` in the decoder's scale, `PICTURES_PER_LATENT` of all but the first frame.

    Decoded in `dtype` where the latent is; nothing stays there.
    """
    decoder = opened.build(dtype, latent.device, only="decoder")
    pieces = [to_levels(piece[:, :, _shown(piece.shape[2])]) for piece in decoder.decode_pieces(latent)]
    frames = torch.cat(pieces, dim=2)[0].permute(1, 2, 3, 0).cpu().numpy()
    return [Image.fromarray(frame) for frame in frames]


def _shown(num_frames: int) -> slice:
    """Which of a latent's frames are shown: every so manieth, the last one among them."""
    step = max(1, num_frames // PICTURES_PER_LATENT)
    return slice(step - 1, None, step)
