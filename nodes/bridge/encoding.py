"""Pictures to ComfyUI's latents, by our encoders with the weights of its VAE."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ...framepack.vae.checkpoint import HUNYUAN_FORMAT
from ...framepack.vae.decoding import encode_clip
from ...memory.plan.tiles import TILES
from ...vae.checks import VaeConfig
from ...vae.tiling import encode_fitting
from ...wanvideo.vae.checkpoint import WAN_FORMAT
from . import host
from .coding_ways import coding_bytes, first_way
from .decoding import HEADROOM_BYTES, latent_statistics
from .native_vae import evict_idle, native_decoder, open_native, vae_at_work

logger = logging.getLogger(__name__)


def encode_images(vae: Any, images: Tensor, tile: int) -> Tensor:
    """The latent `[1, z, t, h, w]` of a video of IMAGE `[T, H, W, C]` in 0 ... 1, in ComfyUI's scale.

    In `tile` pixels a side (0: as large as fits), in smaller ones where the device runs out of memory. Sides are
    cropped and frames left out as ComfyUI's VAE Encode does it. ValueError for the VAE of another model.
    """
    if open_native(HUNYUAN_FORMAT, vae) is not None:
        return _encode_hunyuan(vae, images, tile)
    return _encode_wan(vae, images, tile)


def _encode_wan(vae: Any, images: Tensor, tile: int) -> Tensor:
    opened = open_native(WAN_FORMAT, vae)
    if opened is None:
        raise ValueError(
            "Encode Video (Tiled, Low VRAM) needs a Wan or HunyuanVideo VAE (wan_2.1_vae, wan2.2_vae, "
            "hunyuan_video_vae_bf16), and this is another (tiny decoders only decode): load one of those, or encode "
            "with VAE Encode"
        )
    config, dtype = opened.config, vae.vae_dtype
    if config.encoded_channels != 3:
        raise ValueError(
            f"this VAE encodes {config.encoded_channels} channels of a pixel, with transparency: encode with VAE "
            f"Encode, or load {config.file_name}"
        )
    video, progress = _video(images, config, dtype), host.Progress(1)
    latent = torch.empty(1, config.z_dim, *_latent_size(video, config), device="meta")
    least = coding_bytes(config, dtype, latent, TILES[-1], encodes=True)
    with vae_at_work(opened, dtype, least + HEADROOM_BYTES, "encoder") as encoder:
        # called for every latent frame: whole frames are encoded without a word of how far it is
        encoder.encoder.middle[0].register_forward_pre_hook(lambda *_: host.stop_if_interrupted())
        first, pins = first_way(encoder, latent, tile, encodes=True), host.registrar(encoder.device)
        encoded = encode_fitting(encoder, video, first, progress.update, evict_idle, pins)
    mean, std = latent_statistics(config)
    return encoded * std + mean


def _encode_hunyuan(vae: Any, images: Tensor, tile: int) -> Tensor:
    opened = open_native(HUNYUAN_FORMAT, vae)
    assert opened is not None
    video = _video(images, opened.config, vae.vae_dtype)
    latent = torch.empty(1, opened.config.latent_channels, *_latent_size(video, opened.config), device="meta")
    with native_decoder(vae, latent, only="encoder") as (encoder, room):
        return encode_clip(encoder, video, room, host.check_interrupt, tile) / encoder.config.scaling_factor


def _video(images: Tensor, config: VaeConfig, dtype: torch.dtype) -> Tensor:
    """IMAGE as the VAE takes it, `[1, 3, T, H, W]` in -1 ... 1 on the CPU, in half precision where it computes so."""
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"the pictures are {list(images.shape)}; expected [frames, height, width, channels], at least one frame"
        )
    stride, step = config.spatial_stride, config.temporal_stride
    num_frames, *sides = images.shape[:3]
    if min(sides) < stride or images.shape[3] < 3:
        raise ValueError(
            f"the pictures are {sides[1]}x{sides[0]} of {images.shape[3]} channels; the {config.name} VAE encodes at "
            f"least {stride}x{stride} of 3: resize them, or give colours"
        )
    kept = (num_frames - 1) // step * step + 1
    if kept != num_frames:
        logger.info("%d of %d frames are encoded: the %s VAE takes %dn + 1", kept, num_frames, config.name, step)
    (top, height), (left, width) = (((side % stride) // 2, side // stride * stride) for side in sides)
    pixels = images[:kept, top : top + height, left : left + width, :3].movedim(3, 0)[None]
    return pixels.to("cpu", torch.float32 if dtype == torch.float32 else torch.float16).mul(2).sub_(1)


def _latent_size(video: Tensor, config: VaeConfig) -> tuple[int, int, int]:
    frames, height, width = video.shape[2:]
    stride = config.spatial_stride
    return (frames - 1) // config.temporal_stride + 1, height // stride, width // stride
