"""A weight as each form stores it, for trials and measurements; real files are written by others (`convert.py`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.gguf_reference import BLOCK_TYPES, random_blocks
from ..kernels.row_reference import LARGEST, quantized, row_scales
from .fp8 import Fp8Dequantized
from .gguf import GgufFormat
from .kitchen import PACKAGE, KitchenFormat
from .weight_format import WeightFormat


def sample_of(form: WeightFormat, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """`weight [out, in]` as a layer of this form has it whose stored weight is of `dtype`.

    In a GGUF type it is another one of that shape: random blocks.
    """
    if isinstance(form, GgufFormat):
        return random_gguf(form.name, weight)
    if isinstance(form, KitchenFormat):
        return stored_sample(form, weight)
    return stored_rows(weight, dtype) if isinstance(form, Fp8Dequantized) else {"weight": weight.to(dtype)}


def random_gguf(name: str, like: Tensor) -> dict[str, Tensor]:
    """A weight of random blocks of a GGUF type, of the shape `[out, in]` of another one and beside it."""
    rows, columns = like.shape
    blocks = random_blocks(name, rows * columns // BLOCK_TYPES[name].elements, torch.Generator().manual_seed(0))
    return {"weight": blocks.view(rows, -1).to(like.device)}


def stored_rows(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """`weight [out, in]` in 8 bits with a scale per row."""
    scale = row_scales(weight.float(), LARGEST[dtype])
    return {"weight": quantized(weight.float(), scale, dtype), "weight_scale": scale}


def stored_sample(form: KitchenFormat, weight: Tensor) -> dict[str, Tensor]:
    """`weight [out, in]` as comfy-kitchen stores it in this form."""
    return _PACKERS[form.name](importlib.import_module(PACKAGE), form, weight)


def _nvfp4(kitchen: Any, form: KitchenFormat, weight: Tensor) -> dict[str, Tensor]:
    at_home = weight.cpu()  # its kernel that makes such numbers is for RTX 50 alone; all GPUs unpack them
    scale = at_home.abs().amax().float() / (448 * 6)
    values, blocks = kitchen.quantize_nvfp4(at_home, scale)
    packed = {"weight": values, "weight_scale": blocks, "weight_scale_2": scale}
    return {name: tensor.to(weight.device) for name, tensor in packed.items()}


def _mxfp8(kitchen: Any, form: KitchenFormat, weight: Tensor) -> dict[str, Tensor]:
    values, blocks = kitchen.quantize_mxfp8(weight)
    return {"weight": values, "weight_scale": blocks}


def _w4a4(kitchen: Any, form: KitchenFormat, weight: Tensor) -> dict[str, Tensor]:
    values, scale = kitchen.quantize_convrot_w4a4_weight(weight, form.rotation)
    return {"weight": values, "weight_scale": scale}


def _w4a8(kitchen: Any, form: KitchenFormat, weight: Tensor) -> dict[str, Tensor]:
    values, groups, channels, _, codebook = kitchen.quantize_w4a8_int8_weight(weight, form.group, form.rotation)
    return {
        "weight": values, "weight_s_rel": groups, "weight_s_channel": channels,
        **({} if codebook is None else {"weight_codebook": codebook}),
    }  # fmt: skip


_PACKERS: Mapping[str, Callable[[Any, KitchenFormat, Tensor], dict[str, Tensor]]] = {
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    "convrot_w4a4": _w4a4,
    "asym_w4a8_int8": _w4a8,
}
