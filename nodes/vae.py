"""Decoding a video on a small card: in tiles, frame by frame, with the frames in RAM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..diffusion.tile_retries import Tile, in_shrinking_tiles
from ..framepack.decoding import decode_section
from ..memory.footprint import WorkSize, decode_memory
from ..memory.plan import VAE_TILES
from ..wanvideo.footprint import WAN21_VAE, WAN22_VAE
from ..wanvideo.vae import WanVAE, check_latent
from ..wanvideo.vae_checkpoint import find_prefix, infer_config
from ..wanvideo.vae_tiles import decode_tiled
from ..weights.reader import Checkpoint, TensorInfo
from ..whole_files import write_file
from . import host
from .hunyuan_vae import is_hunyuan_vae, native_decoder

logger = logging.getLogger(__name__)

OVERLAP = 64  # pixels
SMALLEST_TILE = VAE_TILES[-1]
MIB = 2**20


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
                    "tile_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=32,
                    tooltip="Side of a tile in pixels. 0: whole frames if they fit, else the largest tile that does. "
                    "256 suits cards of 6 GB, 128 those of 4 GB.",
                ),
                io.Int.Input(
                    "temporal_chunk",
                    default=0,
                    min=0,
                    max=4096,
                    step=4,
                    tooltip="Whole frames that gather on the GPU before they move to RAM. 0: each as soon as it is "
                    "made, which needs the least memory.",
                    extra_dict={"advanced": True},
                ),
                io.Boolean.Input(
                    "keep_latent",
                    default=True,
                    tooltip="Saves the latent to output/latents before decoding, so that nothing is lost if that "
                    "fails. Copy it to the input folder for Load Latent.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, samples: dict[str, Any], vae: Any, tile_size: int, temporal_chunk: int, keep_latent: bool
    ) -> io.NodeOutput:
        latent: Tensor = samples["samples"]
        if keep_latent:
            _keep(latent)
        if is_hunyuan_vae(vae):
            return io.NodeOutput(_decode_hunyuan(vae, latent, tile_size))
        with _decoder(vae, latent) as decoder:
            tile = tile_size or _choose_tile(decoder, latent)
            video = _decode(decoder, _normalise(latent, decoder), tile, temporal_chunk)
        return io.NodeOutput(_to_images(video))


def _decode_hunyuan(vae: Any, latent: Tensor, tile: int) -> Tensor:
    """IMAGE of FramePack's and HunyuanVideo's latents: a clip at a time, whole where there is room."""
    clips = []
    with native_decoder(vae, latent) as (decoder, room):
        for clip in latent.float().cpu().split(1):
            scaled = clip * decoder.config.scaling_factor  # ComfyUI's latents have the scale of the encoder
            clips.append(decode_section(decoder, scaled, room, host.check_interrupt, tile))
    return torch.cat(clips).float().div_(255)


@contextmanager
def _decoder(vae: Any, latent: Tensor) -> Iterator[WanVAE]:
    """Our decoder with the weights of ComfyUI's VAE, on the device while it works. ValueError for another VAE."""
    stored: dict[str, Tensor] = vae.first_stage_model.state_dict()
    if find_prefix(stored) != "":
        raise ValueError(
            "Decode Video (Tiled, Low VRAM) needs a Wan or HunyuanVideo VAE (wan_2.1_vae, wan2.2_vae, "
            "hunyuan_video_vae_bf16), and this is another: load one of those, or decode with VAE Decode"
        )
    infos = {
        name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path(), 0, tensor.nbytes)
        for name, tensor in stored.items()
    }
    config = infer_config(Checkpoint(Path("the connected VAE"), infos, {}))
    check_latent(config, latent)
    device, dtype = host.decode_device(), vae.vae_dtype
    decoder = WanVAE(config, device="meta", dtype=dtype)
    bytes_needed = sum(info.nbytes for info in infos.values()) + 256 * MIB
    host.make_room(bytes_needed + _decode_bytes(decoder, latent, SMALLEST_TILE), device)
    decoder.load_state_dict(
        {name: stored[name].to(device=device, dtype=dtype) for name in decoder.state_dict()}, assign=True
    )
    try:
        yield decoder.requires_grad_(False)
    finally:
        decoder.to("meta")
        host.empty_cache()


def _decode(decoder: WanVAE, latent: Tensor, tile: int, chunk: int) -> Tensor:
    """Video `[B, 3, T, H, W]` in -1 ... 1 on the CPU; smaller tiles where the device runs out of memory."""
    side = decoder.config.spatial_stride * max(latent.shape[3:])

    def tiled(tile: Tile) -> Tensor:
        return decode_tiled(decoder, latent, tile.pixels, min(OVERLAP, tile.pixels // 2), host.Progress(1).update)

    def as_asked() -> Tensor:
        return tiled(Tile(tile)) if 0 < tile < side else _decode_whole(decoder, latent, chunk)

    return in_shrinking_tiles(as_asked, tiled, _smaller_tiles(min(tile or side, side)), "decoding")


def _smaller_tiles(tile: int) -> list[Tile]:
    """Each about half as large as the one before."""
    smaller = next((size for size in VAE_TILES if size <= tile // 2), SMALLEST_TILE)
    return [Tile(smaller), *_smaller_tiles(smaller)] if smaller < tile else []


def _decode_whole(decoder: WanVAE, latent: Tensor, chunk: int) -> Tensor:
    progress = host.Progress(latent.shape[2])
    done: list[Tensor] = []
    waiting: list[Tensor] = []
    for index, frames in enumerate(decoder.decode(latent)):
        waiting.append(frames)
        if sum(part.shape[2] for part in waiting) >= chunk or index == latent.shape[2] - 1:
            done.append(torch.cat(waiting, dim=2).float().cpu())
            waiting.clear()
        progress.update(index + 1, latent.shape[2])
    return torch.cat(done, dim=2)


def _choose_tile(decoder: WanVAE, latent: Tensor) -> int:
    """0 for whole frames, or the largest tile that fits in what is free."""
    device = decoder.device
    if device.type != "cuda":
        return 0
    host.make_room(_decode_bytes(decoder, latent, 0), device)
    free = host.free_vram(device) - host.reserved_vram()
    sizes = (0, *(tile for tile in VAE_TILES if tile < decoder.config.spatial_stride * max(latent.shape[3:])))
    return next((tile for tile in sizes if _decode_bytes(decoder, latent, tile) <= free), sizes[-1])


def _decode_bytes(decoder: WanVAE, latent: Tensor, tile: int) -> int:
    """What decoding takes besides the weights."""
    config = decoder.config
    footprint = WAN22_VAE if config.residual_shortcuts else WAN21_VAE
    frames, height, width = latent.shape[2:]
    stride = (config.temporal_stride, config.spatial_stride, config.spatial_stride)
    work = WorkSize((frames - 1) * stride[0] + 1, height * stride[1], width * stride[2], latent.shape[0], stride=stride)
    size = decode_memory(footprint, work, latent.shape[1], tile, 0) - footprint.weight_bytes
    return size * decoder.dtype.itemsize // 2  # the footprint is of bf16


def _normalise(latent: Tensor, decoder: WanVAE) -> Tensor:
    """ComfyUI's latents have the scale of the network; ours are normalised."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (decoder.config.latent_mean, decoder.config.latent_std)
    )
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


def _to_images(video: Tensor) -> Tensor:
    """IMAGE `[B * T, H, W, 3]` in 0 ... 1."""
    images = video.float().permute(0, 2, 3, 4, 1).flatten(0, 1)
    return images.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
