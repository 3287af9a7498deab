"""Latents of ComfyUI's to pictures, all at once or as they are made, by our decoders with the weights of its VAE."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...framepack.vae.checkpoint import HUNYUAN_FORMAT
from ...framepack.vae.decoding import decode_section
from ...memory.plan.footprint import WorkSize, decode_memory
from ...memory.plan.tiles import TILES, fitting_tile
from ...vae.checks import VaeConfig, check_latent
from ...vae.files import OpenVae
from ...vae.retries import first_fitting, pieces_fitting
from ...vae.tiling import Tile, decode_in, retry_tiles
from ...vae.tiny import TinyConfig, TinyVAE
from ...vae.tiny_files import TINY_FORMAT
from ...video.pictures import to_uint8
from ...wanvideo.footprint import WAN21_VAE, WAN22_VAE
from ...wanvideo.vae.checkpoint import WAN_FORMAT
from ...wanvideo.vae.model import VAEConfig, WanVAE
from . import host
from .native_vae import evict_idle, native_decoder, open_native, vae_at_work

Frames = Generator[Tensor, None, None]

HEADROOM_BYTES = 256 << 20  # cuDNN's workspaces, and what the allocator cannot fit together again


def decode_video(vae: Any, latent: Tensor, tile: int, chunk: int = 0) -> Tensor:
    """IMAGE `[B * T, H, W, 3]` in 0 ... 1 of a latent `[B, z, t, h, w]`.

    In `tile` pixels a side (0: as large as fits), at least `chunk` frames moving to RAM at a time. ValueError for the
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
    config = opened.config
    with _decoder(opened, vae.vae_dtype, latent) as decoder:
        scaled, progress = _scaled(latent, vae, config), host.Progress(1)

        def decode(way: Tile) -> Tensor:
            return _images(_gathered(decode_in(decoder, scaled, way, progress.update), chunk), latent, config)

        return first_fitting(_ways(decoder, latent, tile), decode, "decoding", evict_idle)


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

        def frames(way: Tile) -> Iterator[Tensor]:
            for piece in decode_in(decoder, scaled, way, progress.update):
                yield to_uint8(piece[:, :3])  # a video has no transparency

        yield from pieces_fitting(_ways(decoder, latent, tile), frames, "decoding", evict_idle)


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
    with vae_at_work(opened, dtype, least + HEADROOM_BYTES, decode_only=True) as decoder:
        yield decoder


def _ways(decoder: WanVAE | TinyVAE, latent: Tensor, tile: int) -> tuple[Tile, ...]:
    """What to try in turn: `tile` pixels, or the largest tile that fits, and then smaller ones."""
    tile = tile or choose_tile(decoder, latent)
    side = decoder.config.spatial_stride * max(latent.shape[3:])
    return Tile(tile), *retry_tiles(decoder.config, min(tile or side, side))


def _images(pieces: Iterator[Tensor], latent: Tensor, config: VaeConfig) -> Tensor:
    """IMAGE `[B * T, H, W, 3]` in 0 ... 1 of video `[B, 3, t, H, W]` in -1 ... 1 that comes in pieces.

    Instead of 3 there are as many channels as the VAE decodes, as in ComfyUI.
    """
    batch, _, num_latents, height, width = latent.shape
    stride, num_frames = config.spatial_stride, (num_latents - 1) * config.temporal_stride + 1
    images = torch.empty(batch, num_frames, height * stride, width * stride, config.decoded_channels)
    num_done = 0
    for piece in pieces:
        done = images[:, num_done : num_done + piece.shape[2]]
        done.zero_()  # pages are made while the device still works on the piece: within a copy they hold it up
        for index, frame in enumerate(piece.unbind(2)):
            done[:, index] = ((frame.float() + 1.0) / 2.0).clamp_(0.0, 1.0).permute(0, 2, 3, 1)
        num_done += piece.shape[2]
    return images.flatten(0, 1)


def _gathered(pieces: Iterator[Tensor], chunk: int) -> Iterator[Tensor]:
    """Pieces of at least `chunk` frames, but for the last."""
    waiting: list[Tensor] = []
    for frames in pieces:
        waiting.append(frames)
        if sum(part.shape[2] for part in waiting) >= chunk:
            yield torch.cat(waiting, dim=2) if len(waiting) > 1 else frames
            waiting.clear()
    if waiting:
        yield torch.cat(waiting, dim=2)


def choose_tile(decoder: WanVAE | TinyVAE, latent: Tensor) -> int:
    """Pixels of a side to code a latent of this shape in: the largest tile that fits in what is free; 0: whole."""
    device, config = decoder.device, decoder.config
    if device.type != "cuda":
        return 0

    def needed(tile: int) -> int:
        return coding_bytes(config, decoder.dtype, latent, tile)

    host.make_room(needed(0), device)
    free = host.free_vram(device) - host.reserved_vram()
    tile = fitting_tile(config.spatial_stride * max(latent.shape[3:]), needed, free)
    return TILES[-1] if tile is None else tile


def coding_bytes(config: VAEConfig | TinyConfig, dtype: torch.dtype, latent: Tensor, tile: int) -> int:
    """What coding takes besides the weights: decoding, and encoding no more."""
    if isinstance(config, TinyConfig):
        height, width = (config.spatial_stride * side for side in latent.shape[3:])
        return len(latent) * config.decode_bytes(min(tile or height, height), min(tile or width, width), dtype.itemsize)
    footprint = WAN22_VAE if config.residual_shortcuts else WAN21_VAE
    frames, height, width = latent.shape[2:]
    stride = (config.temporal_stride, config.spatial_stride, config.spatial_stride)
    work = WorkSize((frames - 1) * stride[0] + 1, height * stride[1], width * stride[2], latent.shape[0], stride=stride)
    size = decode_memory(footprint, work, latent.shape[1], tile, 0) - footprint.weight_bytes
    return size * dtype.itemsize // 2  # the footprint is of bf16


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
