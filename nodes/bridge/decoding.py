"""Latents of ComfyUI's to pictures, by our decoders with the weights of its VAE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...framepack.vae.decoding import decode_section
from ...memory.plan.footprint import WorkSize, decode_memory
from ...memory.plan.tiles import TILES, fitting_tile
from ...vae.checks import check_latent
from ...vae.retries import first_fitting
from ...vae.tiling import Tile, decode_in, retry_tiles
from ...wanvideo.footprint import WAN21_VAE, WAN22_VAE
from ...wanvideo.vae.checkpoint import WAN_FORMAT
from ...wanvideo.vae.model import VAEConfig, WanVAE
from . import host
from .native_vae import decoder_at_work, evict_idle, native_decoder, open_native

HEADROOM_BYTES = 256 << 20  # cuDNN's workspaces, and what the allocator cannot fit together again


def decode_hunyuan(vae: Any, latent: Tensor, tile: int) -> Tensor:
    """IMAGE of FramePack's and HunyuanVideo's latents: a clip at a time, whole where there is room."""
    clips = []
    with native_decoder(vae, latent) as (decoder, room):
        for clip in latent.float().cpu().split(1):
            scaled = clip * decoder.config.scaling_factor  # ComfyUI's latents have the scale of the encoder
            clips.append(decode_section(decoder, scaled, room, host.check_interrupt, tile))
    return torch.cat(clips).float().div_(255)


def decode_wan(vae: Any, latent: Tensor, tile: int, chunk: int) -> Tensor:
    """IMAGE of a Wan latent, `chunk` frames or more moving to RAM at a time.

    In smaller tiles where the device runs out of memory. ValueError for the VAE of another model.
    """
    opened = open_native(WAN_FORMAT, vae)
    if opened is None:
        raise ValueError(
            "Decode Video (Tiled, Low VRAM) needs a Wan or HunyuanVideo VAE (wan_2.1_vae, wan2.2_vae, "
            "hunyuan_video_vae_bf16), and this is another: load one of those, or decode with VAE Decode"
        )
    config, dtype = opened.config, vae.vae_dtype
    check_latent(config, latent)
    normalised, progress = _normalise(latent, config), host.Progress(1)
    least = _decode_bytes(config, dtype, latent, TILES[-1])
    with decoder_at_work(opened, dtype, least + HEADROOM_BYTES) as decoder:
        tile = tile or _choose_tile(decoder, latent)

        def decode(way: Tile) -> Tensor:
            return _images(_gathered(decode_in(decoder, normalised, way, progress.update), chunk), latent, config)

        side = config.spatial_stride * max(latent.shape[3:])
        ways = (Tile(tile), *retry_tiles(config, min(tile or side, side)))
        return first_fitting(ways, decode, "decoding", evict_idle)


def _images(pieces: Iterator[Tensor], latent: Tensor, config: VAEConfig) -> Tensor:
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


def _choose_tile(decoder: WanVAE, latent: Tensor) -> int:
    """0 for whole frames, or the largest tile that fits in what is free."""
    device, config = decoder.device, decoder.config
    if device.type != "cuda":
        return 0

    def needed(tile: int) -> int:
        return _decode_bytes(config, decoder.dtype, latent, tile)

    host.make_room(needed(0), device)
    free = host.free_vram(device) - host.reserved_vram()
    tile = fitting_tile(config.spatial_stride * max(latent.shape[3:]), needed, free)
    return TILES[-1] if tile is None else tile


def _decode_bytes(config: VAEConfig, dtype: torch.dtype, latent: Tensor, tile: int) -> int:
    """What decoding takes besides the weights."""
    footprint = WAN22_VAE if config.residual_shortcuts else WAN21_VAE
    frames, height, width = latent.shape[2:]
    stride = (config.temporal_stride, config.spatial_stride, config.spatial_stride)
    work = WorkSize((frames - 1) * stride[0] + 1, height * stride[1], width * stride[2], latent.shape[0], stride=stride)
    size = decode_memory(footprint, work, latent.shape[1], tile, 0) - footprint.weight_bytes
    return size * dtype.itemsize // 2  # the footprint is of bf16


def _normalise(latent: Tensor, config: VAEConfig) -> Tensor:
    """ComfyUI's latents have the scale of the network; ours are normalised."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latent_mean, config.latent_std))
    return (latent.float().cpu() - mean) / std
