"""Every form that a linear layer's weight is stored and multiplied in on a device, and how to store one in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..weights.kernels.gemms import select_fp8_gemm, select_int8_gemm
from ..weights.kernels.gguf_op import dequantize_in_chunks
from ..weights.kernels.rows import select_row_ops
from ..weights.linear.fp8 import Fp8Dequantized, Fp8Matmul
from ..weights.linear.gguf import GGUF_FORMATS
from ..weights.linear.int8 import Int8Dequantized, Int8Matmul
from ..weights.linear.kitchen import (
    KITCHEN_QUANTS,
    KitchenFormat,
    KitchenInt8,
    kitchen_int8_available,
    kitchen_problem,
)
from ..weights.linear.kitchen_matmul import NATIVE_PRODUCTS, KitchenMatmul, native_refusal
from ..weights.linear.stored_samples import random_gguf, stored_rows, stored_sample
from ..weights.linear.weight_format import PLAIN, WeightFormat

# What a form may lose of the product in the compute dtype before it counts as wrong: of activations with a few large
# features, 16 bits lose 0.2 %, 8 bits 1 to 4 %, 4 bits 10 to 20 %. Wrong results are at 100 %.
EXACT, EIGHT_BITS, FOUR_BITS = 0.02, 0.1, 0.4
FP8_DTYPE = torch.float8_e4m3fn
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")  # one with each number of bits

Pack = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """A form by its format's name; `pack` stores a weight so, `reference` unpacks what cannot be made of one (GGUF).

    `unusable` says why this device has no product of it: there is then no format.
    """

    name: str
    bound: float = EXACT
    format: WeightFormat = PLAIN
    pack: Pack = dict
    reference: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    unusable: str | None = None
    every_shape: bool = True  # False: measured at one, as it is multiplied like a plain one once it is unpacked


def forms_of(device: torch.device) -> Iterator[Form]:
    """The forms, one after the other: some are chosen by timing kernels as they come."""
    ops = select_row_ops(device)
    yield Form(PLAIN.name, pack=lambda weight: {"weight": weight})
    yield Form(
        "fp8 scaled", EIGHT_BITS, Fp8Dequantized(ops=ops), lambda weight: stored_rows(weight, torch.float8_e4m3fn)
    )
    yield _chosen("fp8 matmul", FP8_DTYPE, lambda: Fp8Matmul(select_fp8_gemm(device, ops), ops))
    yield Form("int8", EIGHT_BITS, Int8Dequantized(ops=ops), lambda weight: stored_rows(weight, torch.int8))
    yield _chosen("int8 matmul", torch.int8, lambda: Int8Matmul(0, select_int8_gemm(device, ops), ops))
    if device.type == "cuda" and kitchen_int8_available():
        yield Form("int8 comfy-kitchen", EIGHT_BITS, KitchenInt8(), lambda weight: stored_rows(weight, torch.int8))
    yield from (_gguf(name) for name in GGUF_TYPES)
    yield from _kitchen(device)


def _chosen(name: str, dtype: torch.dtype, choose: Callable[[], WeightFormat]) -> Form:
    """The product in 8 bits that a model would have; ValueError from the choice says why there is none."""
    try:
        return Form(name, EIGHT_BITS, choose(), lambda weight: stored_rows(weight, dtype))
    except ValueError as refusal:
        return Form(name, unusable=str(refusal))


def _gguf(name: str) -> Form:
    def unpacked(packed: Mapping[str, Tensor]) -> Tensor:
        stored = packed["weight"]
        out = torch.empty(GGUF_FORMATS[name].logical_shape(stored), device=stored.device)
        dequantize_in_chunks(stored, out, name)
        return out

    return Form(name, EXACT, GGUF_FORMATS[name], partial(random_gguf, name), unpacked, every_shape=False)


def _kitchen(device: torch.device) -> Iterator[Form]:
    problem = kitchen_problem()
    if problem is not None:
        for name in KITCHEN_QUANTS:
            yield Form(name, unusable=problem)
        return
    for name, quant in KITCHEN_QUANTS.items():
        stored = KitchenFormat(quant)
        bound = EIGHT_BITS if name == "mxfp8" else FOUR_BITS
        yield Form(name, bound, stored, partial(stored_sample, stored), every_shape=False)
        if name in NATIVE_PRODUCTS:
            native = KitchenMatmul(stored)
            refusal = native_refusal(stored, device)
            if refusal is not None:
                yield Form(native.name, unusable=refusal)
            else:
                yield Form(native.name, bound, native, partial(stored_sample, stored))
