"""Our HunyuanVideo decoder with the weights of ComfyUI's VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..framepack.decoding import HEADROOM_BYTES, DecodeRoom
from ..framepack.runs import run_key
from ..framepack.vae import HunyuanVAE, decode_footprint
from ..framepack.vae_checkpoint import DECODER, adopt_vae, build_vae, find_prefix, to_diffusers_names
from ..weights.reader import Checkpoint, TensorInfo
from . import host

NUM_SAMPLED = 64


def is_hunyuan_vae(vae: Any) -> bool:
    """Whether a VAE is HunyuanVideo's, which FramePack shares."""
    return find_prefix(vae.first_stage_model.state_dict()) == ""


@contextmanager
def native_decoder(
    vae: Any, latents: Tensor, vram_left: Callable[[], int | None] = lambda: None
) -> Iterator[tuple[HunyuanVAE, DecodeRoom | None]]:
    """Our decoder on the device while it works, and the memory that it may use beside its weights (None: any).

    Idle models leave the device as far as whole `latents [1, 16, t, h, w]` need their room. `vram_left` tells what a
    budget leaves then, if there is one. ValueError for the VAE of another model.
    """
    stored: dict[str, Tensor] = vae.first_stage_model.state_dict()
    if find_prefix(stored) != "":
        raise ValueError(
            "FramePack needs the HunyuanVideo VAE (hunyuan_video_vae_bf16), and this is another: load that"
        )
    names = to_diffusers_names(stored)
    infos = {
        names[name]: TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path(), 0, tensor.nbytes)
        for name, tensor in stored.items()
    }
    config, fitting = adopt_vae(Checkpoint(Path("the connected VAE"), infos, {}))
    device, dtype = host.decode_device(), vae.vae_dtype
    weight_bytes = sum(info.nbytes for name, info in fitting.tensors.items() if name.startswith(DECODER))
    frames, height, width = latents.shape[2], *(config.spatial_stride * side for side in latents.shape[3:])
    whole = decode_footprint(config, frames, height, width, dtype.itemsize)
    host.make_room(weight_bytes + whole.total_bytes + HEADROOM_BYTES, device)

    def read(name: str) -> Tensor:
        info = fitting.tensors[name]
        return stored[info.name].view(info.shape)

    decoder = build_vae(config, read, dtype, device, decode_only=True)
    try:
        yield decoder.requires_grad_(False), _room(device, vram_left())
    finally:
        decoder.to("meta")
        host.empty_cache()


def vae_fingerprint(vae: Any) -> str:
    """What tells a VAE's weights from others', by the first numbers of every tensor."""
    stored: dict[str, Tensor] = vae.first_stage_model.state_dict()
    return run_key({name: tensor.flatten()[:NUM_SAMPLED] for name, tensor in stored.items()})


def _room(device: torch.device, vram_left: int | None) -> DecodeRoom | None:
    if device.type != "cuda":
        return None
    registrar = host.HostRegistrar(device) if host.memory_flags().may_pin else None
    free = max(0, host.free_vram(device) - host.reserved_vram())
    if vram_left is not None:
        free = min(free, vram_left)
    return DecodeRoom(free, host.free_ram() // 2, registrar)
