"""Dimensions of the Wan video transformers, inferred from files and never from their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WanConfig:
    """One Wan transformer.

    `model_type` is one of "t2v", "i2v", "flf2v", "ti2v" (per-frame timesteps, 48 latent channels), "vace", "camera",
    and "control" for those that take other latents (a control video, a reference) beside the noise.
    `image_dim` > 0 means CLIP vision tokens come in through `img_emb` and `cross_attn.k_img`;
    `image_pos_tokens` > 0 means `img_emb.emb_pos` is present (first and last frame, 2 x 257 tokens).
    `vace_layers` blocks beside the others take control videos of `vace_channels`; `reference_channels` > 0 means a
    picture may be shown as a frame of its own (`ref_conv`), `camera_channels` > 0 that the camera's rays are an input
    (`control_adapter`).
    Source: Wan-Video/Wan2.1 and Wan2.2, `wan/modules/model.py`.
    """

    model_type: str = "t2v"
    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_tokens: int = 512
    freq_dim: int = 256
    image_dim: int = 0
    image_pos_tokens: int = 0
    vace_layers: int = 0
    vace_channels: int = 0
    reference_channels: int = 0
    camera_channels: int = 0
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads
