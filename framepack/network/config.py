"""Dimensions of the FramePack transformers."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_TOKENS = 729  # of a picture, by SigLIP


@dataclass(frozen=True)
class FramePackConfig:
    """One FramePack transformer; the defaults are those of the published ones.

    `model_type` is "base" (sections are made from the last to the first) or "f1" (forward); it changes nothing in the
    network. `rope_axes` are the dimensions of a head that turn with time, height and width.
    Source: lllyasviel/FramePack, `diffusers_helper/models/hunyuan_video_packed.py`.
    """

    num_heads: int = 24
    head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    pooled_dim: int = 768
    image_dim: int = 1152
    mlp_ratio: float = 4.0
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    freq_dim: int = 256
    eps: float = 1e-6
    model_type: str = "base"

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)
