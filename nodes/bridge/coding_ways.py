"""How a video is decoded or encoded in what ComfyUI's device has free."""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import Tensor

from ...memory.plan.decode import choose_decode, decode_memory
from ...memory.plan.footprint import Limits, WorkSize
from ...memory.plan.tiles import TILES
from ...memory.plan.vae_footprint import VaeFootprint
from ...vae.strips import Strips
from ...vae.tiling import Tile, Way, retry_ways
from ...vae.tiny import TinyConfig, TinyVAE
from ...wanvideo.footprint import WAN21_ENCODER, WAN21_VAE, WAN22_ENCODER, WAN22_VAE
from ...wanvideo.vae.model import VAEConfig, WanVAE
from . import host


def first_way(vae: WanVAE | TinyVAE, latent: Tensor, tile: int, encodes: bool = False) -> Way:
    """`tile` pixels a side where given, else the most exact way that fits a video with a latent of this shape."""
    device, config = vae.device, vae.config
    if tile or device.type != "cuda":
        return Tile(tile)
    host.make_room(coding_bytes(config, vae.dtype, latent, 0, encodes), device)
    free = host.free_vram(device) - host.reserved_vram()
    limits = Limits(free, context_bytes=0, ram_budget_bytes=host.free_ram() // 2)
    footprint = _footprint(config, vae.dtype, encodes)
    planned = choose_decode(footprint, _work(config, latent), latent.shape[1], limits)
    if planned is None:
        return Tile(TILES[-1])
    return Strips(planned.rows, planned.in_ram, host.registrar(device)) if planned.rows else Tile(planned.tile)


def ways(vae: WanVAE | TinyVAE, latent: Tensor, tile: int) -> list[Way]:
    """What to try in turn: `tile` pixels, or what fits, and then leaner ones."""
    height, width = (vae.config.spatial_stride * side for side in latent.shape[3:])
    first = first_way(vae, latent, tile)
    return [first, *retry_ways(vae, first, (height, width), host.registrar(vae.device))]


def coding_bytes(
    config: VAEConfig | TinyConfig, dtype: torch.dtype, latent: Tensor, tile: int, encodes: bool = False
) -> int:
    """What coding takes besides the weights, in whole frames (0) or tiles."""
    return decode_memory(_footprint(config, dtype, encodes), _work(config, latent), latent.shape[1], tile, 0)


def _work(config: VAEConfig | TinyConfig, latent: Tensor) -> WorkSize:
    frames, height, width = latent.shape[2:]
    stride = (config.temporal_stride, config.spatial_stride, config.spatial_stride)
    return WorkSize((frames - 1) * stride[0] + 1, height * stride[1], width * stride[2], stride=stride)


def _footprint(config: VAEConfig | TinyConfig, dtype: torch.dtype, encodes: bool) -> VaeFootprint:
    """One video's, without the weights."""
    if isinstance(config, TinyConfig):
        side = config.spatial_stride
        return VaeFootprint(0, 0, -(-config.decode_bytes(side, side, dtype.itemsize) // side**2))
    two_two, two_one = (WAN22_ENCODER, WAN21_ENCODER) if encodes else (WAN22_VAE, WAN21_VAE)
    _, *sizes = astuple(two_two if config.residual_shortcuts else two_one)
    return VaeFootprint(0, *(size * dtype.itemsize // 2 for size in sizes))  # the footprints are of bf16
