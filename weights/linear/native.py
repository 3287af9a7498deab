"""Whether 4-bit weights multiply as they are stored on a device: where that is right, and faster than unpacking."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...system.dtypes import half_dtype
from ...system.kernel_choice import Trial, choose, cuda_seconds, disagreement, relative_error
from .kitchen import KitchenFormat
from .kitchen_matmul import NATIVE_PRODUCTS, KitchenMatmul, native_refusal
from .linear import Linear
from .projection import Scratch
from .stored_samples import stored_sample
from .weight_format import WeightFormat

logger = logging.getLogger(__name__)

TRIED_ROWS, TRIED_DIM = 48, 512
TIMED_ROWS, TIMED_DIM = 4096, 5120  # a Wan 14B's layer


def use_native(layers: Sequence[Linear], device: torch.device) -> None:
    """Have layers of 4-bit weights multiply as stored, by form, where that agrees with the unpacked one and is faster.

    ValueError where no layer is stored in such a form, or the device has no units for it.
    """
    stored = {layer.format for layer in layers if isinstance(layer.format, KitchenFormat)}
    native = {form for form in stored if form.name in NATIVE_PRODUCTS}
    if not native:
        held = ", ".join(sorted({f"{layer.format.name} {layer.weight.dtype}" for layer in layers}))
        raise ValueError(
            f"quantization is 4bit_fast, but no layer of this model is stored in 4 bits that multiply as they are "
            f"(stored as: {held}); expected {', '.join(NATIVE_PRODUCTS)}; choose quantization none"
        )
    for form in sorted(native, key=lambda form: form.name):
        refusal = native_refusal(form, device)
        if refusal is not None:
            raise ValueError(
                f"quantization is 4bit_fast, but {form.quant.title} cannot be multiplied as stored: {refusal}; "
                "choose quantization none, which unpacks them"
            )
        chosen = faster_form(form, device)
        for layer in layers:
            if layer.format == form and isinstance(chosen, KitchenMatmul) and chosen.suits(layer.packed()):
                layer.format = chosen


def faster_form(form: KitchenFormat, device: torch.device) -> KitchenFormat | KitchenMatmul:
    """The form multiplied as stored where that is right and faster here, else unpacked; the log says what it costs."""
    native = KitchenMatmul(form)
    error = 0.0

    def check(tried: KitchenFormat | KitchenMatmul) -> str | None:
        nonlocal error
        if tried is form:
            return None
        error = layer_difference(native, form, device)
        return disagreement(error, native.product.error)

    seconds = None if device.type == "cpu" else lambda tried: form_seconds(tried, form, device)
    trial: Trial[KitchenFormat | KitchenMatmul] = Trial(f"4-bit layers ({form.name})", device, check, seconds)
    chosen = choose(trial, (native, form), form).best
    if chosen is native:
        logger.info("%s: multiplied as stored; a layer differs by %.1f %% from the unpacked.", form.name, 100 * error)
    else:
        logger.warning("quantization 4bit_fast gains nothing for %s on %s: its weights are unpacked", form.name, device)
    return chosen


def layer_difference(native: KitchenMatmul, form: KitchenFormat, device: torch.device) -> float:
    """Relative difference of a small layer multiplied as stored to the same layer unpacked."""
    weight, x = _layer(device, TRIED_ROWS, TRIED_DIM)
    packed = stored_sample(form, weight)
    got, want = (each.prepare(packed, None, x.dtype, None)(x) for each in (native, form))
    return relative_error(got, want)


def form_seconds(tried: WeightFormat, form: KitchenFormat, device: torch.device) -> float:
    """Median time on the GPU of a whole layer of a Wan 14B's size, unpacking or quantising included."""
    weight, x = _layer(device, TIMED_ROWS, TIMED_DIM)
    packed: Mapping[str, Tensor] = stored_sample(form, weight)
    out, scratch = torch.empty_like(x), Scratch(device, x.dtype, weight.numel())

    def layer() -> None:
        scratch.reset()
        tried.prepare(packed, None, x.dtype, scratch)(x, out=out)

    return cuda_seconds(layer, device)


def _layer(device: torch.device, num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    generator, dtype = torch.Generator(device).manual_seed(0), half_dtype(device)
    weight = torch.randn(dim, dim, generator=generator, device=device, dtype=dtype) / dim**0.5
    return weight, torch.randn(num_rows, dim, generator=generator, device=device, dtype=dtype)
