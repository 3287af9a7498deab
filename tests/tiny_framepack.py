"""Tiny random FramePack transformers in every layout of the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from lowvram_video.framepack.checkpoint import MODEL_TYPE_KEY, ROPE_AXES, ROPE_AXES_KEY
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel
from lowvram_video.weights.kernels.gguf_reference import dequantize_reference
from lowvram_video.weights.linear.linear import Linear
from safetensors.torch import save_file
from torch import Tensor

from .quantizers import quantize, write_gguf

CONFIG = FramePackConfig(
    num_heads=2, head_dim=16, num_layers=2, num_single_layers=2, text_dim=24, pooled_dim=12, image_dim=20,
    rope_axes=(4, 6, 6),
)  # fmt: skip
# Packed types take rows of 256; heads of 128 need no metadata.
WIDE = replace(
    CONFIG, head_dim=128, rope_axes=(16, 56, 56), num_layers=1, num_single_layers=1, num_refiner_layers=1,
    text_dim=256, pooled_dim=256, image_dim=256, mlp_ratio=2.0,
)  # fmt: skip

LAYOUTS = ("single", "prefix", "shards")
NUM_SHARDS = 3


def make_tensors(config: FramePackConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Weights in fp32 by diffusers' names, of a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in FramePackModel(config, device="meta").state_dict().items():
        values = torch.randn(like.shape, generator=generator)
        if like.ndim > 1:
            values *= 0.7 / like[0].numel() ** 0.5
        elif name.endswith(("norm_q.weight", "norm_k.weight", "added_q.weight", "added_k.weight", "norm1.weight")):
            values = 1 + 0.1 * values
        else:
            values *= 0.05
        tensors[name] = values
    return tensors


def save_framepack(
    path: Path,
    config: FramePackConfig = CONFIG,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layout: str = "single",
) -> Path:
    """Write a model in one of LAYOUTS at `path`, a file or the folder of "shards"; returns what a user would choose."""
    tensors = {name: tensor.to(dtype) for name, tensor in make_tensors(config, seed).items()}
    if layout == "shards":
        return save_shards(path, tensors, metadata_of(config))
    prefix = {"single": "", "prefix": "model.diffusion_model."}[layout]
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata_of(config))
    return path


def save_shards(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """As on the hub: an index, and shards with the names of diffusers."""
    folder.mkdir(exist_ok=True)
    stem = "diffusion_pytorch_model"
    weight_map = {
        name: f"{stem}-{1 + index * NUM_SHARDS // len(tensors):05d}-of-{NUM_SHARDS:05d}.safetensors"
        for index, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        shard = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(shard, folder / file, metadata)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_framepack_gguf(
    path: Path, quant: str, config: FramePackConfig = WIDE, flat: bool = False, plain: str = "F16"
) -> tuple[Path, dict[str, Tensor]]:
    """Linear weights in a packed type, the rest `plain`; also returns what the file stands for.

    `flat` stores convolutions as `[dim, the rest]`.
    """
    model = FramePackModel(config, device="meta")
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    stored: dict[str, tuple[Tensor, str]] = {}
    truth = {}
    for name, values in make_tensors(config).items():
        if name in linear:
            packed = quantize(values, quant)
            stored[name], truth[name] = (packed, quant), dequantize_reference(packed, quant, values.shape)
            continue
        kind = plain if values.ndim > 1 else "F32"
        truth[name] = values.to({"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind])
        stored[name] = (values.flatten(1) if flat and values.ndim > 2 else values, kind)
    return write_gguf(path, stored, "hyvid", metadata_of(config)), truth


def metadata_of(config: FramePackConfig) -> dict[str, str]:
    """What shapes and names do not tell."""
    metadata = {} if config.head_dim in ROPE_AXES else {ROPE_AXES_KEY: ",".join(map(str, config.rope_axes))}
    return {**metadata, MODEL_TYPE_KEY: config.model_type} if config.model_type != "base" else metadata
