"""ComfyUI's own 4-bit and block-scaled formats, unpacked by its package comfy-kitchen where that is installed.

They are made for the newest GPUs' matrix units; here they save memory and transfers, and are multiplied in the compute
dtype, which every GPU can. Source of names and layouts: ComfyUI 0.33 (`comfy/ops.py`) and comfy-kitchen 0.2.31.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...system.kernel_choice import brief
from ...system.triton_errors import triton_errors
from ..files.checkpoint import CheckpointError, TensorInfo
from .int8 import Int8Dequantized
from .projection import Projection, Scratch
from .weight_format import MultipliedAsStored, WeightFormat

PACKAGE = "comfy_kitchen"


@dataclass(frozen=True)
class KitchenQuant:
    """A format's name in files, what it is, whether two weights share a byte, and what unpacks it.

    `needs` are tensors beside the weight without which nothing does; where there is a scale of a byte for each so many
    weights of a row, `block` is their number.
    """

    name: str
    title: str
    halved: bool  # `weight` has half as many columns
    unpack: Callable[[Any, Mapping[str, Tensor], KitchenFormat, torch.dtype], Tensor]
    needs: tuple[str, ...] = ("weight_scale",)
    block: int = 0

    def problem(self, weight: TensorInfo, beside: Mapping[str, TensorInfo]) -> str | None:
        """Why a weight cannot be of this format by what lies beside it, or None; `beside` is by names."""
        missing = [name for name in self.needs if name not in beside or not beside[name].nbytes]
        if missing:
            return f"without its {missing[0]}"
        if weight.dtype.itemsize != 1:
            return f"in {weight.dtype}, and not in bytes"
        scale, wanted = beside[self.needs[0]], math.prod(weight.shape) * (1 + self.halved) // max(1, self.block)
        if self.block and (scale.dtype.itemsize != 1 or math.prod(scale.shape) < wanted):
            return f"with scales {list(scale.shape)} of {scale.dtype}, which are not one byte for every {self.block}"
        return None


@dataclass(frozen=True)
class KitchenFormat(WeightFormat):
    """The weight is unpacked by comfy-kitchen. `group` and `rotation` are sizes in input features."""

    quant: KitchenQuant
    group: int = 16
    rotation: int = 256

    @property
    def name(self) -> str:
        return self.quant.name

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        kitchen = importlib.import_module(PACKAGE)
        weight = self.quant.unpack(kitchen, packed, self, out.dtype).to(out.dtype)
        smooth = packed.get("pre_quant_scale")  # what the activations were to be multiplied by
        if smooth is not None:
            weight = weight * smooth.to(out.dtype)
        return out.copy_(weight)

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        rows, columns = weight.shape
        return rows, 2 * columns if self.quant.halved else columns


@dataclass(frozen=True)
class KitchenInt8(MultipliedAsStored):
    """W8A8 through comfy-kitchen's `int8_linear`, whose CUDA kernels rotate, quantise, multiply and scale."""

    rotation: int = 0
    name: str = "int8 comfy-kitchen"

    def row_bytes(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """Its int8 numbers, and its product: in int32 where cuBLAS makes it, then as a tensor of its own."""
        num_outputs, num_inputs = packed["weight"].shape
        return num_inputs + torch.float32.itemsize + num_outputs * (torch.int32.itemsize + dtype.itemsize)

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        return KitchenInt8Projection(packed["weight"], packed["weight_scale"].float(), bias, self.rotation)

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        return Int8Dequantized(self.rotation).unpack(packed, out)


class KitchenInt8Projection(Projection):
    """`x @ weight.T + bias` with both in int8; the rows are quantised anew for every layer."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, rotation: int):
        self.weight, self.scale, self.bias, self.rotation = weight, scale, bias, rotation
        self.int8_linear = importlib.import_module(PACKAGE).int8_linear

    def multiply(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        product = self.int8_linear(
            rows, self.weight, self.scale, self.bias, rows.dtype,
            convrot=self.rotation > 0, convrot_groupsize=self.rotation or 256,
        )  # fmt: skip
        return product if out is None else out.copy_(product)


def kitchen_problem() -> str | None:
    """Why comfy-kitchen cannot be used here, or None."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "comfy-kitchen is not installed: pip install comfy-kitchen"
    try:
        importlib.import_module(PACKAGE)
    except triton_errors() as error:
        return f"comfy-kitchen is installed but cannot be imported ({brief(error)}): pip install -U comfy-kitchen"
    return None


def kitchen_int8_available() -> bool:
    """Whether comfy-kitchen is installed and its CUDA kernels are usable."""
    return kitchen_problem() is None and cuda_kernels() is not None


def cuda_kernels() -> Collection[str] | None:
    """Those of comfy-kitchen, which is there; None where they are not usable (ComfyUI turns them off below CUDA 13)."""
    listed = getattr(importlib.import_module(PACKAGE), "list_backends", dict)  # an empty folder has none
    backends: dict[str, dict[str, Any]] = listed()
    cuda = backends.get("cuda", {})
    return cuda.get("capabilities", ()) if cuda.get("available") and not cuda.get("disabled") else None


def recognise_kitchen(weight: TensorInfo) -> KitchenFormat | None:
    """The format of such a weight. CheckpointError where comfy-kitchen is not installed."""
    words = (weight.quant or "").split()
    quant = KITCHEN_QUANTS.get(words[0]) if len(words) == 3 else None
    if quant is None:
        return None
    problem = kitchen_problem()
    if problem is not None:
        raise CheckpointError(
            f"{weight.file}: its weights are {quant.title}, which comfy-kitchen unpacks. {problem}, or choose the "
            "fp8 scaled or a GGUF version"
        )
    return KitchenFormat(quant, int(words[1]), int(words[2]))


def kitchen_quant_name(quant: KitchenQuant, group: int, rotation: int) -> str:
    """How `TensorInfo.quant` names the format with its sizes."""
    return f"{quant.name} {group} {rotation}"


# --- per format ------------------------------------------------------------------------------------------


def _nvfp4(kitchen: Any, packed: Mapping[str, Tensor], how: KitchenFormat, dtype: torch.dtype) -> Tensor:
    blocks = packed["weight_scale"].view(torch.float8_e4m3fn)
    return kitchen.dequantize_nvfp4(packed["weight"], packed["weight_scale_2"].float(), blocks, dtype)


def _mxfp8(kitchen: Any, packed: Mapping[str, Tensor], how: KitchenFormat, dtype: torch.dtype) -> Tensor:
    blocks = packed["weight_scale"].view(torch.float8_e8m0fnu)
    return kitchen.dequantize_mxfp8(packed["weight"], blocks, dtype)


def _w4a4(kitchen: Any, packed: Mapping[str, Tensor], how: KitchenFormat, dtype: torch.dtype) -> Tensor:
    return kitchen.dequantize_convrot_w4a4_weight(
        packed["weight"], packed["weight_scale"], how.rotation, 64, output_dtype=dtype
    )


def _w4a8(kitchen: Any, packed: Mapping[str, Tensor], how: KitchenFormat, dtype: torch.dtype) -> Tensor:
    groups = packed["weight_s_rel"]
    return kitchen.dequantize_w4a8_int8_weight(
        packed["weight"],
        groups.view(torch.float8_e4m3fn) if groups.dtype == torch.uint8 else groups,
        packed["weight_s_channel"],
        packed.get("weight_codebook"),
        group_size=how.group,
        convrot_groupsize=how.rotation,
        output_dtype=dtype,
    )


KITCHEN_QUANTS: Mapping[str, KitchenQuant] = {
    quant.name: quant
    for quant in (
        KitchenQuant(
            "nvfp4",
            "4-bit floats (NVFP4), made for RTX 50 (compute capability 10)",
            True,
            _nvfp4,
            ("weight_scale", "weight_scale_2"),
            16,
        ),
        KitchenQuant(
            "mxfp8",
            "block-scaled 8-bit floats (MXFP8), made for RTX 50 (compute capability 10)",
            False,
            _mxfp8,
            block=32,
        ),
        KitchenQuant("convrot_w4a4", "rotated 4-bit integers (W4A4), made for RTX 20 or later", True, _w4a4),
        KitchenQuant(
            "asym_w4a8_int8",
            "4-bit integers (W4A8), made for RTX 30 or later",
            True,
            _w4a8,
            ("weight_s_rel", "weight_s_channel"),
        ),
    )
}
