"""Our HunyuanVideo decoder with the weights of ComfyUI's VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..framepack.decoding import DecodeRoom
from ..framepack.runs import run_key
from ..framepack.vae import HunyuanVAE
from ..framepack.vae_checkpoint import adopt_vae, find_prefix, to_diffusers_names
from ..weights.reader import Checkpoint, TensorInfo
from . import host

MIB = 2**20
NUM_SAMPLED = 64


def is_hunyuan_vae(vae: Any) -> bool:
    """Whether a VAE is HunyuanVideo's, which FramePack shares."""
    return find_prefix(vae.first_stage_model.state_dict()) == ""


@contextmanager
def native_decoder(
    vae: Any, vram_left: Callable[[], int | None] = lambda: None
) -> Iterator[tuple[HunyuanVAE, DecodeRoom | None]]:
    """Our decoder on the device while it works, and the memory that it may use beside its weights (None: any).

    `vram_left` tells what a budget leaves then, if there is one. ValueError for the VAE of another model.
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
    decoder = HunyuanVAE(config, device="meta", dtype=dtype)
    host.make_room(sum(info.nbytes for info in infos.values()) + 256 * MIB, device)
    weights = {}
    for name, info in fitting.tensors.items():
        weights[name] = stored[info.name].view(info.shape).to(device=device, dtype=dtype)
    decoder.load_state_dict(weights, assign=True)
    if device.type == "cuda" and dtype.itemsize == 2:
        decoder.to_channels_last()
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
