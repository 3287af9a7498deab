"""Products of ComfyUI's 4-bit formats as they are stored, by comfy-kitchen, on cards that have units for them.

Activations are quantised as they come: NVFP4's to 4 bits in blocks, W4A4's to 4 and W4A8's to 8 bits after a rotation.
Source of the calls: ComfyUI 0.33 (`comfy/ops.py`) and comfy-kitchen 0.2.31 (`tensor/nvfp4.py`, `tensor/w4a8_int8.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.late_rows import GivenRows, tensor_of
from .kitchen import PACKAGE, KitchenFormat, cuda_kernels, kitchen_problem
from .projection import Projection, Scratch
from .weight_format import MultipliedAsStored

FP4_LARGEST, FP8_LARGEST = 6.0, 448.0
TINY = 1e-12  # the scale of rows that are all zero


@dataclass(frozen=True)
class BlockRows:
    """Rows in NVFP4, with a scale for each block and one for all; what is padded is cut off after the product."""

    values: Tensor
    blocks: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class NativeProduct:
    """comfy-kitchen's product of one format: the function that is it, and the GPUs whose units it is made for.

    `error` is what is allowed of a layer against the same layer unpacked: activations lose that much by their form.
    """

    function: str
    capability: tuple[int, int]
    cards: str
    on_cpu: bool
    error: float
    quantize: Callable[[Any, Tensor], Any]
    multiply: Callable[[Any, Any, KitchenMatmulProjection], Tensor]


@dataclass(frozen=True)
class KitchenMatmul(MultipliedAsStored):
    """The weight is multiplied as it is stored."""

    stored: KitchenFormat

    @property
    def name(self) -> str:
        return f"{self.stored.name} matmul"

    @property
    def product(self) -> NativeProduct:
        return NATIVE_PRODUCTS[self.stored.name]

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        return KitchenMatmulProjection(self, packed, bias)

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        return self.stored.unpack(packed, out)

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        return self.stored.logical_shape(weight)

    def suits(self, packed: Mapping[str, Tensor]) -> bool:
        rows, columns = self.logical_shape(packed["weight"])
        return rows % 16 == 0 and columns % max(64, self.stored.rotation if self.is_rotated else 0) == 0

    def row_bytes(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """Its numbers, in 8 bits at most, and its product: in 32 bits where that is what is scaled, then by itself."""
        num_outputs, num_inputs = self.logical_shape(packed["weight"])
        return num_inputs + torch.float32.itemsize + num_outputs * (torch.int32.itemsize + dtype.itemsize)

    @property
    def is_rotated(self) -> bool:
        """Whether groups of input features were rotated before they were quantised."""
        return self.stored.name in ("convrot_w4a4", "asym_w4a8_int8")


class KitchenMatmulProjection(Projection):
    """`x @ weight.T + bias`, both quantised."""

    def __init__(self, how: KitchenMatmul, packed: Mapping[str, Tensor], bias: Tensor | None):
        self.how, self.packed, self.bias = how, packed, bias
        self.kitchen = importlib.import_module(PACKAGE)
        self.smooth = packed.get("pre_quant_scale")
        # rows that each layer multiplies by its own factors are no other layer's
        self.form = how.name if self.smooth is None else f"{how.name} {self.smooth.data_ptr()}"

    def quantize(self, x: GivenRows) -> Any:
        x = tensor_of(x)
        rows = x if self.smooth is None else x * self.smooth.to(x.dtype)
        return self.how.product.quantize(self.kitchen, rows)

    def multiply(self, rows: Any, out: Tensor | None = None) -> Tensor:
        product = self.how.product.multiply(self.kitchen, rows, self)
        return product if out is None else out.copy_(product)


def native_refusal(stored: KitchenFormat, device: torch.device) -> str | None:
    """Why this device cannot multiply the format as it is stored, or None. On a CPU comfy-kitchen does some, slowly."""
    product = NATIVE_PRODUCTS.get(stored.name)
    if product is None:
        return f"{stored.quant.title} are no 4-bit numbers"
    problem = kitchen_problem()
    if problem is not None:
        return problem
    if device.type == "cpu":
        return None if product.on_cpu else "a CPU has no such product"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device} is no NVIDIA GPU"
    have = torch.cuda.get_device_capability(device)
    if have < product.capability:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {have[0]}.{have[1]}; its product needs "
            f"{product.capability[0]}.{product.capability[1]} ({product.cards})"
        )
    kernels = cuda_kernels()
    if kernels is None:
        return "comfy-kitchen's CUDA kernels are not usable here (it wants a PyTorch for CUDA 13)"
    if product.function not in kernels:
        return f"this comfy-kitchen has no CUDA kernel {product.function}: update it"
    return None


# --- per format ----------------------------------------------------------------------------------------------------


def _nvfp4_rows(kitchen: Any, x: Tensor) -> BlockRows:
    rows = x.reshape(-1, x.shape[-1])
    scale = (rows.abs().amax().float() / (FP8_LARGEST * FP4_LARGEST)).clamp_min_(TINY)  # of this chunk of rows
    values, blocks = kitchen.quantize_nvfp4(rows, scale, pad_16x=rows.shape[0] % 16 > 0)
    return BlockRows(values, blocks, scale, x.shape, x.dtype)


def _nvfp4(kitchen: Any, rows: BlockRows, layer: KitchenMatmulProjection) -> Tensor:
    packed = layer.packed
    product = kitchen.scaled_mm_nvfp4(
        rows.values, packed["weight"], tensor_scale_a=rows.scale, tensor_scale_b=packed["weight_scale_2"].float(),
        block_scale_a=rows.blocks, block_scale_b=packed["weight_scale"].view(torch.float8_e4m3fn),
        bias=layer.bias, out_dtype=rows.dtype,
    )  # fmt: skip
    num_rows = rows.shape[:-1].numel()
    return product[:num_rows].view(*rows.shape[:-1], product.shape[-1])


def _as_they_are(kitchen: Any, x: Tensor) -> Tensor:
    return x.contiguous()  # quantised by the product itself


def _w4a4(kitchen: Any, rows: Tensor, layer: KitchenMatmulProjection) -> Tensor:
    packed = layer.packed
    return kitchen.convrot_w4a4_linear(
        rows, packed["weight"], packed["weight_scale"], layer.bias,
        convrot_groupsize=layer.how.stored.rotation, quant_group_size=64,
    )  # fmt: skip


def _w4a8(kitchen: Any, rows: Tensor, layer: KitchenMatmulProjection) -> Tensor:
    packed, stored = layer.packed, layer.how.stored
    groups = packed["weight_s_rel"]
    return kitchen.w4a8_int8_linear(
        rows, packed["weight"], groups.view(torch.float8_e4m3fn) if groups.dtype == torch.uint8 else groups,
        packed["weight_s_channel"], codebook=packed.get("weight_codebook"), bias=layer.bias,
        group_size=stored.group, convrot_groupsize=stored.rotation, out_dtype=rows.dtype,
    )  # fmt: skip


# By `KitchenQuant.name`. The errors are two to six times what normal activations lose in that form.
NATIVE_PRODUCTS: Mapping[str, NativeProduct] = {
    "nvfp4": NativeProduct("scaled_mm_nvfp4", (10, 0), "RTX 50 or later", False, 0.25, _nvfp4_rows, _nvfp4),
    "convrot_w4a4": NativeProduct("convrot_w4a4_linear", (7, 5), "RTX 20 or later", True, 0.25, _as_they_are, _w4a4),
    "asym_w4a8_int8": NativeProduct("w4a8_int8_linear", (8, 0), "RTX 30 or later", True, 0.04, _as_they_are, _w4a8),
}
