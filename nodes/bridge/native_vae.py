"""Our video autoencoders with the weights of ComfyUI's VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...framepack.vae.checkpoint import HUNYUAN_FORMAT
from ...framepack.vae.decoding import HEADROOM_BYTES, DecodeBudget
from ...framepack.vae.model import HunyuanVAE, decode_footprint
from ...system.content_key import run_key
from ...vae.checks import VaeConfig
from ...vae.files import Half, OpenVae, VaeFormat
from ...vae.retries import at_work, empty_cache
from . import host

NUM_SAMPLED = 64

C = TypeVar("C", bound=VaeConfig)
V = TypeVar("V", bound=nn.Module)


def open_native(format: VaeFormat[C, V], vae: Any) -> OpenVae[C, V] | None:
    """The weights of ComfyUI's VAE; None where it is another family's. ValueError where there is none."""
    if vae is None:
        raise ValueError("there is no VAE: the file that a checkpoint loader opened has none in it; connect Load VAE")
    return format.open_tensors(vae.first_stage_model.state_dict(), host.unmap_pages)


@contextmanager
def vae_at_work(opened: OpenVae[C, V], dtype: torch.dtype, room_bytes: int, only: Half) -> Iterator[V]:
    """Our VAE on ComfyUI's device while it works; idle models leave as far as it needs `room_bytes` besides."""
    device = host.decode_device()
    host.make_room(opened.weight_bytes(dtype, only) + room_bytes, device)
    with at_work(lambda: opened.build(dtype, device, only), evict_idle) as network:
        yield network
    host.empty_cache()


def evict_idle() -> None:
    """Have all idle models leave the device, which had no memory left."""
    empty_cache()
    host.make_room(int(host.EVERYTHING), host.decode_device())


@contextmanager
def native_decoder(
    vae: Any, latents: Tensor, vram_left: Callable[[], int | None] = lambda: None, only: Half = "decoder"
) -> Iterator[tuple[HunyuanVAE, DecodeBudget | None]]:
    """HunyuanVideo's VAE on the device, and the memory that it may use beside its weights (None: any).

    Idle models leave the device as far as whole `latents [1, 16, t, h, w]` need their room. `vram_left` tells what a
    budget leaves then, if there is one. ValueError for the VAE of another model.
    """
    opened = open_native(HUNYUAN_FORMAT, vae)
    if opened is None:
        raise ValueError(
            "FramePack needs the HunyuanVideo VAE (hunyuan_video_vae_bf16), and this is another: load that"
        )
    height, width = (opened.config.spatial_stride * side for side in latents.shape[3:])
    whole = decode_footprint(opened.config, latents.shape[2], height, width, vae.vae_dtype.itemsize)
    with vae_at_work(opened, vae.vae_dtype, whole.total_bytes + HEADROOM_BYTES, only) as decoder:
        yield decoder, _decode_budget(decoder.device, vram_left())


def vae_fingerprint(vae: Any) -> str:
    """What tells a VAE's weights from others', by the first numbers of every tensor."""
    stored: dict[str, Tensor] = vae.first_stage_model.state_dict()
    return run_key({name: tensor.flatten()[:NUM_SAMPLED] for name, tensor in stored.items()})


def _decode_budget(device: torch.device, vram_left: int | None) -> DecodeBudget | None:
    if device.type != "cuda":
        return None
    free = max(0, host.free_vram(device) - host.reserved_vram())
    if vram_left is not None:
        free = min(free, vram_left)
    return DecodeBudget(free, host.free_ram() // 2, host.registrar(device))
