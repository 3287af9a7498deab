"""Decoding a video on a small card: in tiles, frame by frame, with the frames in RAM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from comfy_api.latest import io
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..framepack.vae.checkpoint import HUNYUAN_FORMAT
from ..framepack.vae.decoding import decode_section
from ..memory.plan.footprint import WorkSize, decode_memory
from ..memory.plan.tiles import TILES, fitting_tile
from ..system.atomic_files import write_file
from ..vae.checks import check_latent
from ..vae.retries import first_fitting
from ..vae.tiling import Tile, decode_in, retry_tiles
from ..vae.to_host import behind_decoding
from ..wanvideo.footprint import WAN21_VAE, WAN22_VAE
from ..wanvideo.vae.checkpoint import WAN_FORMAT
from ..wanvideo.vae.model import VAEConfig, WanVAE
from .bridge import host
from .bridge.hunyuan_vae import decoder_at_work, evict_idle, native_decoder, open_native
from .inputs import ADVANCED

logger = logging.getLogger(__name__)

HEADROOM_BYTES = 256 << 20  # cuDNN's workspaces, and what the allocator cannot fit together again


class DecodeVideo(io.ComfyNode):
    """A Wan latent to frames, within the memory that there is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMDecodeVideo",
            display_name="Decode Video (Tiled, Low VRAM)",
            description="Decodes a Wan video frame by frame, in overlapping tiles where the card is too small for "
            "whole frames. Wan's time is never cut, so there are no pulses; frames move to RAM as they are made.",
            search_aliases=["vae decode tiled", "wan vae", "decode video"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent of a Wan or FramePack model."),
                io.Vae.Input(
                    "vae",
                    tooltip="wan_2.1_vae for Wan 2.1 and 2.2 14B, wan2.2_vae for TI2V 5B, hunyuan_video_vae_bf16 for "
                    "FramePack.",
                ),
                io.Int.Input(
                    "tile_size", default=0, min=0, max=4096, step=32,
                    tooltip="Side of a tile in pixels. 0: whole frames if they fit, else the largest tile that does. "
                    "256 suits cards of 6 GB, 128 those of 4 GB.",
                ),
                io.Int.Input(
                    "temporal_chunk", default=0, min=0, max=4096, step=4,
                    tooltip="Whole frames that gather on the GPU before they move to RAM. 0: each as soon as it is "
                    "made, which needs the least memory.", extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "keep_latent", default=True,
                    tooltip="Saves the latent to output/latents before decoding, so that nothing is lost if that "
                    "fails. Copy it to the input folder for Load Latent.",
                ),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, samples: dict[str, Any], vae: Any, tile_size: int, temporal_chunk: int, keep_latent: bool
    ) -> io.NodeOutput:
        latent: Tensor = samples["samples"]
        if keep_latent:
            _keep(latent)
        if open_native(HUNYUAN_FORMAT, vae) is not None:
            return io.NodeOutput(_decode_hunyuan(vae, latent, tile_size))
        return io.NodeOutput(_decode_wan(vae, latent, tile_size, temporal_chunk))


def _decode_hunyuan(vae: Any, latent: Tensor, tile: int) -> Tensor:
    """IMAGE of FramePack's and HunyuanVideo's latents: a clip at a time, whole where there is room."""
    clips = []
    with native_decoder(vae, latent) as (decoder, room):
        for clip in latent.float().cpu().split(1):
            scaled = clip * decoder.config.scaling_factor  # ComfyUI's latents have the scale of the encoder
            clips.append(decode_section(decoder, scaled, room, host.check_interrupt, tile))
    return torch.cat(clips).float().div_(255)


def _decode_wan(vae: Any, latent: Tensor, tile: int, chunk: int) -> Tensor:
    """IMAGE of a Wan latent; smaller tiles where the device runs out of memory."""
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
    """IMAGE `[B * T, H, W, 3]` in 0 ... 1 of video `[B, 3, t, H, W]` in -1 ... 1 that comes in pieces."""
    batch, _, num_latents, height, width = latent.shape
    stride, num_frames = config.spatial_stride, (num_latents - 1) * config.temporal_stride + 1
    images = torch.empty(batch, num_frames, height * stride, width * stride, 3)
    num_taken = 0

    def take(piece: Tensor) -> None:
        nonlocal num_taken
        for frame in piece.unbind(2):
            images[:, num_taken] = ((frame.float() + 1.0) / 2.0).clamp_(0.0, 1.0).permute(0, 2, 3, 1)
            num_taken += 1

    for _ in behind_decoding(pieces, take):
        pass
    return images.flatten(0, 1)


def _gathered(pieces: Iterator[Tensor], chunk: int) -> Iterator[Tensor]:
    """Pieces of at least `chunk` frames, but for the last."""
    waiting: list[Tensor] = []
    for frames in pieces:
        waiting.append(frames)
        if sum(part.shape[2] for part in waiting) >= chunk:
            yield torch.cat(waiting, dim=2)
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


def _keep(latent: Tensor) -> None:
    """Write the latent as ComfyUI's Save Latent does; where that fails, decoding is all the more wanted."""
    tensors = {"latent_tensor": latent.contiguous().cpu(), "latent_format_version_0": torch.tensor([])}
    try:
        path = host.output_path("latents/LowVRAM", ".latent")
        write_file(path, save(tensors))
    except (OSError, SafetensorError) as error:
        logger.warning("the latent is not kept, as it cannot be written (%s): decoding goes on", error)
    else:
        logger.info("the latent is kept in %s", path)
