"""How quantised layers multiply on a device: unpacked, in fp8, in int8, or in 4 bits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...system.device_errors import is_out_of_memory
from ...system.dtypes import half_dtype
from ...system.kernel_choice import Trial, choose, cuda_seconds, disagreement, relative_error
from ..kernels.gemms import fp8_refusal, fuses_gelu, int8_refusal, select_fp8_gemm, select_int8_gemm
from ..kernels.row_reference import RowOps
from ..kernels.rows import select_row_ops
from .fp8 import Fp8Dequantized, Fp8Matmul
from .int8 import Int8Dequantized, Int8Matmul
from .kitchen import KitchenInt8, kitchen_int8_available
from .kitchen_matmul import KitchenMatmul
from .linear import Linear
from .made_fp8 import Fp8Made
from .native import use_native
from .projection import Projection
from .stored_fp8 import fp8_form, is_fp8_faster
from .weight_format import Plain, WeightFormat

logger = logging.getLogger(__name__)

# "fp8", "fp8_fast" and "int8" also say what 16-bit files are quantised to as they are read: see quantize.py.
AUTO_FAST = "auto_fast"
QUANTIZATIONS = ("none", "fp8", "fp8_fast", "int8", "4bit_fast", AUTO_FAST)
STORED_FP8 = "stored, in fp8"  # what auto_fast becomes where it is not "none"; nobody chooses it by name


def select_compute(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    quantization: str,
    device: torch.device,
    beside: Sequence[torch.device] = (),
) -> str:
    """Set how each linear layer of a model multiplies on `device`; called again, it chooses again.

    Only layers of the blocks, which see thousands of rows, multiply in 8 bits: with "fp8_fast" fp8 weights, unless
    their file asks for full precision, and weights that are unpacked anyway; else int8 weights wherever the device can,
    and 4-bit ones with "4bit_fast" where that is faster here. ValueError where an explicit choice cannot run. Returns
    the quantization; of "auto_fast" what it became: "none", or STORED_FP8, with which the same is chosen on the devices
    `beside`, all of which can.
    """
    if quantization not in (*QUANTIZATIONS, STORED_FP8):
        raise ValueError(f"quantization is {quantization!r}; expected one of {', '.join(QUANTIZATIONS)}")
    ops = select_row_ops(device)
    epilogue = fuses_gelu(device)
    for layer in _linears([model]):
        layer.format = _unpacked(layer.format, ops)
        layer.fuses_gelu = epilogue
    layers = list(_linears(blocks))
    decided = "none" if quantization == AUTO_FAST else quantization
    try:
        if quantization == AUTO_FAST:
            decided = _fastest_within_error(layers, [device, *beside], ops)
        if decided in ("fp8_fast", STORED_FP8):
            _use_fp8(layers, decided, device, ops)
        _use_int8(layers, decided, device, ops)
        if decided == "4bit_fast":
            use_native(layers, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.warning(
            "%s has no memory left to try products of 8-bit weights: for now they are unpacked, which is slower; load "
            "the model again when other models have left the GPU", device,
        )  # fmt: skip
    return decided


def describe_products(layers: Sequence[Linear]) -> str:
    """How layers multiply, for a run's record: what compares equal rounds equally, whoever's kernel multiplies."""
    forms = [layer.format for layer in layers]
    counts = Counter(Int8Matmul.name if isinstance(form, KitchenInt8) else form.name for form in forms)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _linears(modules: Sequence[nn.Module]) -> Iterator[Linear]:
    for module in modules:
        yield from (layer for layer in module.modules() if isinstance(layer, Linear))


def _unpacked(form: WeightFormat, ops: RowOps) -> WeightFormat:
    """The same stored form, multiplied in the compute dtype."""
    if isinstance(form, Fp8Made):
        return _unpacked(form.stored, ops)
    if isinstance(form, Fp8Matmul):
        return Plain(_casting(ops)) if form.unscaled else Fp8Dequantized(ops=ops)
    if isinstance(form, Plain):
        return Plain(_casting(ops))
    if isinstance(form, Int8Matmul | KitchenInt8):
        return Int8Dequantized(form.rotation, ops)
    if isinstance(form, KitchenMatmul):
        return form.stored
    if isinstance(form, Fp8Dequantized | Int8Dequantized):
        return replace(form, ops=ops)
    return form


def _casting(ops: RowOps) -> RowOps | None:
    """What casts plain 8-bit weights: PyTorch by itself takes four times as long as one read and one write."""
    return ops if ops.name == "triton" else None


def _fastest_within_error(layers: Sequence[Linear], devices: Sequence[torch.device], ops: RowOps) -> str:
    """By the time of the first device, of what all can."""
    refusal, device = next(filter(None, map(_no_fp8, devices)), None), devices[0]
    if refusal is not None:
        logger.info("products: auto_fast unpacks weights: %s", refusal)
        return "none"
    product = Fp8Matmul(select_fp8_gemm(device, ops), ops)
    return STORED_FP8 if is_fp8_faster(layers, device, product) else "none"


def _no_fp8(device: torch.device) -> str | None:
    return "a processor multiplies in fp32" if device.type == "cpu" else fp8_refusal(device)


def _use_fp8(layers: Sequence[Linear], quantization: str, device: torch.device, ops: RowOps) -> None:
    product = Fp8Matmul(select_fp8_gemm(device, ops), ops)
    chosen = 0
    for layer in layers:
        # fp8_fast made what was of 16 bits fp8 as it was read; int8 weights have products of their own
        left = Plain | Fp8Dequantized if quantization == "fp8_fast" else Int8Dequantized
        form = fp8_form(layer, product)
        if form is not None and not (isinstance(form, Fp8Made) and isinstance(layer.format, left)):
            layer.format = form
            chosen += 1
    if not chosen:
        stored = ", ".join(sorted({f"{layer.format.name} {layer.weight.dtype}" for layer in layers}))
        raise ValueError(
            f"quantization is fp8_fast, but no layer of this model can be multiplied in fp8 (stored as: {stored}); "
            "expected float8_e4m3fn weights whose file does not ask for full precision, GGUF or int8; choose "
            "quantization none"
        )
    logger.info("%d of %d layers are multiplied in fp8 (%s).", chosen, len(layers), product.gemm.name)


def _use_int8(layers: Sequence[Linear], quantization: str, device: torch.device, ops: RowOps) -> None:
    stored = [layer for layer in layers if isinstance(layer.format, Int8Dequantized)]
    if not stored:
        return
    refusal = int8_refusal(device)
    if refusal is not None:
        if quantization == "int8":
            raise ValueError(f"quantization is int8, which cannot run here: {refusal}; choose fp8 or none")
        logger.info("int8 weights are unpacked, not multiplied as such: %s.", refusal)
        return
    product = Int8Matmul(0, select_int8_gemm(device, ops), ops)
    for rotation in sorted({layer.format.rotation for layer in stored if isinstance(layer.format, Int8Dequantized)}):
        form = _faster(replace(product, rotation=rotation), device)
        for layer in stored:
            rotated = isinstance(layer.format, Int8Dequantized) and layer.format.rotation == rotation
            if rotated and form.suits(layer.packed()):
                layer.format = form
        logger.info("int8 layers are multiplied as such: %s.", form.name)


def _faster(product: Int8Matmul, device: torch.device) -> Int8Matmul | KitchenInt8:
    """Ours or comfy-kitchen's, by the time of a whole layer."""
    if device.type != "cuda" or not kitchen_int8_available():
        return product
    trial: Trial[Int8Matmul | KitchenInt8] = Trial(
        f"int8 layers rotated by {product.rotation}",
        device,
        lambda form: disagreement(layer_error(form, Int8Matmul(product.rotation), device)),
        lambda form: layer_seconds(form, device),
    )
    return choose(trial, (product, KitchenInt8(product.rotation)), product).best


def layer_error(form: WeightFormat, reference: WeightFormat, device: torch.device) -> float:
    """Relative difference of a small layer of int8 weights to the reference's, which quantises its rows too."""
    results = []
    for each in (form, reference):
        project, x = _int8_layer(each, device, 48, 512)
        results.append(project(x))
    return relative_error(*results)


def layer_seconds(form: WeightFormat, device: torch.device) -> float:
    """Median time on the GPU of one layer of int8 weights of a Wan 14B's size, activations quantised included."""
    project, x = _int8_layer(form, device, 4096, 5120)
    out = torch.empty_like(x)
    return cuda_seconds(lambda: project(x, out=out), device)


def _int8_layer(form: WeightFormat, device: torch.device, num_rows: int, dim: int) -> tuple[Projection, Tensor]:
    """A layer `dim -> dim` of random weights, always the same, and its input."""
    generator, dtype = torch.Generator(device).manual_seed(0), half_dtype(device)
    x = torch.randn(num_rows, dim, generator=generator, device=device, dtype=dtype)
    weight = torch.randint(-127, 128, (dim, dim), generator=generator, device=device, dtype=torch.int8)
    packed = {"weight": weight, "weight_scale": torch.rand(dim, 1, generator=generator, device=device) * 1e-3}
    return form.prepare(packed, torch.zeros(dim, device=device, dtype=dtype), dtype, None), x
