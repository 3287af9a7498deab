"""What video autoencoders ask of their files and inputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..weights.files.checkpoint import Checkpoint, CheckpointError

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]


class NamedConfig(Protocol):
    """A network's configuration, by what messages call it and its file."""

    @property
    def name(self) -> str: ...
    @property
    def file_name(self) -> str: ...


class VaeConfig(NamedConfig, Protocol):
    """An autoencoder's: its latents, its strides, and whose latents messages call them.

    `latents_at_once` is how many latent frames a tile holds where tiles of space alone do not fit; None for a VAE to
    which time costs no memory. `decoded_channels` are those of a decoded pixel, most often 3.
    """

    @property
    def models(self) -> str: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def temporal_stride(self) -> int: ...
    @property
    def spatial_stride(self) -> int: ...
    @property
    def latents_at_once(self) -> int | None: ...
    @property
    def decoded_channels(self) -> int: ...

    def advice(self, latent_channels: int) -> str:
        """What to do about a latent of another number of channels."""


def check_video(vae: VaeConfig, video: Tensor) -> None:
    """Raise ValueError, with the fix, unless `vae` can encode `video` [B, 3, T, H, W]."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(
            f"the {vae.name} VAE encodes video [batch, 3, frames, height, width]; got {list(video.shape)}. "
            "Move the colour channels to the second place and drop an alpha channel."
        )
    num_frames, height, width = video.shape[2:]
    step, stride = vae.temporal_stride, vae.spatial_stride
    if num_frames < 1 or (num_frames - 1) % step:
        shorter = max(num_frames - 1, 0) // step * step + 1
        raise ValueError(
            f"the video has {num_frames} frames; the {vae.name} VAE encodes {step}n+1. "
            f"Use {shorter} or {shorter + step} frames."
        )
    if height % stride or width % stride or min(height, width) < stride:
        fitting = [max(round(side / stride), 1) * stride for side in (height, width)]
        raise ValueError(
            f"the video is {width}x{height} pixels; the {vae.name} VAE needs both sides to divide by {stride}. "
            f"Resize or crop it to {fitting[1]}x{fitting[0]}."
        )


def check_latent(vae: VaeConfig, latent: Tensor) -> None:
    """Raise ValueError, with the fix, unless `latent` [B, z, T, h, w] is one that `vae` decodes."""
    if latent.ndim != 5 or min(latent.shape[2:]) < 1:
        raise ValueError(
            f"the {vae.name} VAE decodes latents [batch, {vae.latent_channels}, frames, height, width] of at least one "
            f"frame; got {list(latent.shape)}. A single image is a video of one frame."
        )
    if latent.shape[1] != vae.latent_channels:
        raise ValueError(
            f"the latent has {latent.shape[1]} channels, but the {vae.name} VAE decodes {vae.latent_channels} "
            f"(latents of {vae.models} models). {vae.advice(latent.shape[1])}"
        )


def check_tensors(checkpoint: Checkpoint, vae: NamedConfig, wanted: Shapes) -> None:
    """Raise CheckpointError unless the file holds every tensor of `wanted`, unpacked and in its shape."""
    for name, shape in wanted.items():
        info = checkpoint.tensors.get(name)
        found = "nothing" if info is None else info.quant or list(info.shape)
        if info is None or info.quant or info.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} of a {vae.name} VAE is {found}; expected {list(shape)} as plain "
                f"numbers. Download {vae.file_name} again, in bf16, fp16 or fp32."
            )
    unused = sorted(checkpoint.tensors.keys() - wanted.keys())
    if unused:
        logger.info("%s: %d tensors are no part of the VAE, such as %s", checkpoint.path, len(unused), unused[0])
