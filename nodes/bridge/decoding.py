"""Latents of ComfyUI's to pictures, all at once or as they are made, by our decoders with the weights of its VAE."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...framepack.vae.checkpoint import HUNYUAN_FORMAT
from ...framepack.vae.decoding import decode_section
from ...memory.plan.tiles import TILES
from ...vae.checks import VaeConfig, check_latent
from ...vae.files import OpenVae
from ...vae.retries import first_fitting, pieces_fitting
from ...vae.tiling import WHOLE, Way, decode_in
from ...vae.tiny import TinyConfig, TinyVAE
from ...vae.tiny_files import TINY_FORMAT
from ...video.pictures import to_levels, to_uint8
from ...wanvideo.vae.checkpoint import WAN_FORMAT
from ...wanvideo.vae.model import VAEConfig, WanVAE
from . import host
from .coding_ways import coding_bytes, ways
from .native_vae import evict_idle, native_decoder, open_native, vae_at_work

Frames = Generator[Tensor, None, None]

HEADROOM_BYTES = 256 << 20  # cuDNN's workspaces, and what the allocator cannot fit together again


def decode_video(vae: Any, latent: Tensor, tile: int, chunk: int = 0) -> Tensor:
    """IMAGE `[B * T, H, W, 3]` in 0 ... 1 of a latent `[B, z, t, h, w]`.

    In `tile` pixels a side (0: whole frames, or strips where they do not fit), at least `chunk` whole frames moving to
    RAM at a time. ValueError for the
    VAE of another model.
    """
    if open_native(HUNYUAN_FORMAT, vae) is not None:
        return torch.cat(list(_hunyuan_clips(vae, latent, tile))).float().div_(255)
    return _images_of(vae, latent, tile, chunk)


def num_frames(vae: Any, latent: Tensor) -> int:
    """How many frames a latent `[B, z, t, h, w]` has. ValueError for one, or a VAE, of another model."""
    config: VaeConfig = (open_native(HUNYUAN_FORMAT, vae) or _opened(vae)).config
    check_latent(config, latent)
    return (latent.shape[2] - 1) * config.temporal_stride + 1


def decode_frames(vae: Any, latent: Tensor, tile: int) -> Frames:
    """Frames, uint8 `[t, H, W, 3]` on the CPU, of the latent of one video `[1, z, t, h, w]`, as they are made.

    As `decode_video`; what was passed on is not made again after an out-of-memory. Closing the iterator frees the
    device. HunyuanVideo's norms see all frames, so that its frames come together.
    """
    if open_native(HUNYUAN_FORMAT, vae) is not None:
        return _hunyuan_clips(vae, latent, tile)
    return _frames_of(vae, latent, tile)


def _hunyuan_clips(vae: Any, latent: Tensor, tile: int) -> Frames:
    """FramePack's and HunyuanVideo's latents: a clip at a time, whole where there is room."""
    with native_decoder(vae, latent) as (decoder, room):
        for clip in latent.float().cpu().split(1):
            scaled = clip * decoder.config.scaling_factor  # ComfyUI's latents have the scale of the encoder
            yield decode_section(decoder, scaled, room, host.check_interrupt, tile)


def _images_of(vae: Any, latent: Tensor, tile: int, chunk: int) -> Tensor:
    opened = _opened(vae)
    with _decoder(opened, vae.vae_dtype, latent) as decoder:
        images, progress = _new_images(latent, opened.config), host.Progress(1)
        scaled = _scaled(latent, vae, opened.config)
        for clip, clip_images in zip(scaled.split(1), images.split(1), strict=True):
            into = clip_images.permute(0, 4, 1, 2, 3)

            def decode(way: Way, clip: Tensor = clip, into: Tensor = into) -> None:
                if chunk and way == WHOLE:
                    _gather(decode_in(decoder, clip, way, progress.update), chunk, into)
                    return
                for _ in decode_in(decoder, clip, way, progress.update, _to_unit, into):
                    pass

            first_fitting(ways(decoder, clip, tile), decode, "decoding", evict_idle)
    return images.flatten(0, 1)


def _frames_of(vae: Any, latent: Tensor, tile: int) -> Frames:
    opened = _opened(vae)
    channels = opened.config.decoded_channels
    if channels not in (3, 4):
        raise ValueError(
            f"this VAE decodes {channels} channels of a pixel, which are no colours of a video: load "
            f"{opened.config.file_name}, or decode with Decode Video (Tiled, Low VRAM) for nodes that know them"
        )
    with _decoder(opened, vae.vae_dtype, latent) as decoder:
        scaled, progress = _scaled(latent, vae, opened.config), host.Progress(1)

        def frames(way: Way) -> Iterator[Tensor]:
            return map(to_uint8, decode_in(decoder, scaled, way, progress.update, _to_colours))

        yield from pieces_fitting(ways(decoder, latent, tile), frames, "decoding", evict_idle)


def _opened(vae: Any) -> OpenVae[Any, Any]:
    """A Wan VAE or a tiny decoder, which both hand out frames as they are made."""
    opened: OpenVae[Any, Any] | None = open_native(WAN_FORMAT, vae) or open_native(TINY_FORMAT, vae)
    if opened is None:
        raise ValueError(
            "this node needs a Wan or HunyuanVideo VAE (wan_2.1_vae, wan2.2_vae, hunyuan_video_vae_bf16) or a tiny "
            "decoder of theirs (lighttaew2_1, lighttaew2_2, taehv), and this is another: load one of those, or decode "
            "with VAE Decode"
        )
    return opened


@contextmanager
def _decoder(opened: OpenVae[Any, Any], dtype: torch.dtype, latent: Tensor) -> Iterator[WanVAE | TinyVAE]:
    """The decoder at work, with room for the smallest tiles of the latent. ValueError for the latent of another."""
    check_latent(opened.config, latent)
    least = coding_bytes(opened.config, dtype, latent, TILES[-1])
    with vae_at_work(opened, dtype, least + HEADROOM_BYTES, only="decoder") as decoder:
        yield decoder


def _new_images(latent: Tensor, config: VaeConfig) -> Tensor:
    """IMAGE `[B, T, H, W, 3]` of a latent, to be filled.

    Instead of 3 there are as many channels as the VAE decodes, as in ComfyUI.
    """
    batch, _, num_latents, height, width = latent.shape
    stride, num_frames = config.spatial_stride, (num_latents - 1) * config.temporal_stride + 1
    return torch.empty(batch, num_frames, height * stride, width * stride, config.decoded_channels)


def _to_unit(video: Tensor) -> Tensor:
    """-1 ... 1 as IMAGE has it."""
    return ((video.float() + 1.0) / 2.0).clamp_(0.0, 1.0)


def _to_colours(video: Tensor) -> Tensor:
    """Levels of the colours: a video file has no transparency."""
    return to_levels(video[:, :3])


def _gather(pieces: Iterator[Tensor], chunk: int, into: Tensor) -> None:
    """Fill `into` with pieces that wait on the device until they have `chunk` frames."""
    waiting: list[Tensor] = []
    num_done = 0
    for frames in pieces:
        waiting.append(frames)
        gathered = sum(part.shape[2] for part in waiting)
        if gathered >= chunk or num_done + gathered == into.shape[2]:
            into[:, :, num_done : num_done + gathered] = _to_unit(torch.cat(waiting, dim=2))
            num_done += gathered
            waiting.clear()


def _scaled(latent: Tensor, vae: Any, config: VAEConfig | TinyConfig) -> Tensor:
    """ComfyUI's latents have the scale of the network; ours are normalised, and a tiny decoder knows its own."""
    if isinstance(config, TinyConfig):
        scale = getattr(vae.first_stage_model, "process_in", None)
        return latent.float().cpu() if scale is None else scale(latent.float().cpu())
    mean, std = latent_statistics(config)
    return (latent.float().cpu() - mean) / std


def latent_statistics(config: VAEConfig) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a Wan latent's channels, `[1, z, 1, 1, 1]`."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latent_mean, config.latent_std))
    return mean, std
