"""The linear layers of a Wan 14B block in every way of multiplying: time per layer over all token chunks, and error.

python benchmarks/quantized_linears.py                        # 480x832x81 and 720x1280x81, chunks of 4096 and 8192
python benchmarks/quantized_linears.py --tokens 32760 --chunks 4096

A layer's time holds what a pass has: unpacking the weight once, then quantising and multiplying chunk by chunk; q, k
and v, which share their rows, are timed together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lowvram_video.card.forms import EIGHT_BITS, Form
from lowvram_video.card.products import layer_input
from lowvram_video.system.kernel_choice import cuda_seconds
from lowvram_video.system.triton_errors import triton_errors
from lowvram_video.weights.kernels.gemms import Fp8Rescaled, Fp8Rowwise, Gemm, Int8Product
from lowvram_video.weights.kernels.row_reference import RowOps, TorchRowOps
from lowvram_video.weights.kernels.rows import select_row_ops
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.linear.fp8 import Fp8Dequantized, Fp8Matmul
from lowvram_video.weights.linear.int8 import Int8Dequantized, Int8Matmul, rotate, rotation_matrix
from lowvram_video.weights.linear.kitchen import KitchenInt8, kitchen_int8_available
from lowvram_video.weights.linear.linear import Linear, project_together
from lowvram_video.weights.linear.projection import Scratch
from lowvram_video.weights.linear.stored_samples import stored_rows
from lowvram_video.weights.linear.weight_format import WeightFormat
from measure import save_results
from torch import Tensor, nn

DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Layers that read the same rows."""

    title: str
    inputs: int
    outputs: int
    num_layers: int = 1


SHAPES = (
    Shape("q, k, v", 5120, 5120, 3),
    Shape("o", 5120, 5120),
    Shape("ffn.0", 5120, 13824),
    Shape("ffn.2", 13824, 5120),
)
PER_BLOCK = {"q, k, v": 1, "o": 3, "ffn.0": 1, "ffn.2": 1}  # "o" stands for cross-attention's q and o too


def ways(ops: RowOps) -> list[Form]:
    found = [
        Form("bf16", pack=lambda weight: {"weight": weight}),
        fp8_form("fp8 unpacked", Fp8Dequantized(ops=ops)),
        fp8_form("fp8 unpacked by torch", Fp8Dequantized(ops=TorchRowOps())),
        fp8_form("fp8_fast row-wise", Fp8Matmul(Fp8Rowwise(), ops)),
        fp8_form("fp8_fast then scaled", Fp8Matmul(Fp8Rescaled(ops), ops)),
        fp8_form("fp8 scale 1, clamped (as peers)", Clamped()),
        _int8("int8 unpacked", Int8Dequantized(ops=ops)),
        _int8("int8 torch, then scaled", Int8Matmul(0, Int8Product(ops), ops)),
        _int8("int8 rotated 256, torch, then scaled", Int8Matmul(256, Int8Product(ops), ops), 256),
    ]
    if ops.name == "triton":
        from lowvram_video.weights.kernels.gemms import TILES, Int8Triton

        gemms: list[Gemm] = [Int8Triton(tile) for tile in TILES]
        found += [_int8(gemm.name, Int8Matmul(0, gemm, ops)) for gemm in gemms]
    if kitchen_int8_available():
        found += [_int8("int8 comfy-kitchen", KitchenInt8()), _int8("int8 kitchen rotated", KitchenInt8(256), 256)]
    return found


def fp8_form(name: str, form: WeightFormat) -> Form:
    return Form(name, EIGHT_BITS, form, lambda weight: stored_rows(weight, torch.float8_e4m3fn))


def _int8(name: str, form: WeightFormat, rotation: int = 0) -> Form:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        turned = rotate(weight.float(), rotation_matrix(rotation, weight.device)) if rotation else weight
        return stored_rows(turned, torch.int8)

    return Form(name, EIGHT_BITS, form, pack)


class Clamped(Fp8Matmul):
    """What others do: activations clamped to the range of fp8 and cast, with a scale of one."""

    def __init__(self) -> None:
        super().__init__(Fp8Rowwise(), CastRows())


class CastRows(TorchRowOps):
    def quantize(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn), torch.ones(x.shape[0], 1, device=x.device)


def layer_of(weight: Tensor, bias: Tensor, form: Form) -> Linear:
    outputs, inputs = weight.shape
    layer = Linear(inputs, outputs, device=DEVICE, dtype=BF16)
    layer.format = form.format
    for name, tensor in {**form.pack(weight), "bias": bias}.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return layer


def run(layers: Sequence[Linear], x: Tensor, outs: Sequence[Tensor], chunk: int, scratch: Scratch) -> None:
    scratch.reset()
    projections = [layer.prepare(BF16, scratch) for layer in layers]
    num_chunks = -(-x.shape[0] // chunk)
    step = -(-x.shape[0] // num_chunks)
    for first in range(0, x.shape[0], step):
        rows = slice(first, first + step)
        project_together(projections, x[rows], [out[rows] for out in outs])


def measure(shape: Shape, tokens: int, chunk: int, found: Sequence[Form], repeats: int) -> dict[str, dict[str, object]]:
    weight, x, bias = layer_input(shape.inputs, shape.outputs, tokens, DEVICE, BF16)
    outs = [torch.empty(tokens, shape.outputs, device=DEVICE, dtype=BF16) for _ in range(shape.num_layers)]
    scratch = Scratch(DEVICE, BF16, shape.num_layers * weight.numel())
    flops = 2.0 * tokens * weight.numel() * shape.num_layers
    sample = x[:512].double()
    results: dict[str, dict[str, object]] = {}
    for way in found:
        layers = [layer_of(weight, bias, way)] * shape.num_layers
        try:
            took = cuda_seconds(partial(run, layers, x, outs, chunk, scratch), DEVICE, repeats=repeats)
        except triton_errors() as problem:
            results[way.name] = {"failed": (str(problem) or type(problem).__name__).splitlines()[0]}
            continue
        want = sample @ weight.double().t() + layers[0].bias.double()
        error = float((outs[0][:512].double() - want).norm() / want.norm())
        results[way.name] = {
            "milliseconds": round(1e3 * took, 3),
            "tera_per_s": round(flops / took / 1e12),
            "relative_error": round(error, 5),
        }
    for result in results.values():
        if "milliseconds" in result and "milliseconds" in results["bf16"]:
            result["of_bf16"] = round(result["milliseconds"] / results["bf16"]["milliseconds"], 3)
    return results


def chosen() -> dict[str, str]:
    """What `select_compute` picks on this GPU."""
    picks = {}
    for stored, quantization in (("fp8", "fp8_fast"), ("int8", "int8")):
        form: WeightFormat = Fp8Dequantized() if stored == "fp8" else Int8Dequantized()
        weight, _, bias = layer_input(64, 64, 1, DEVICE, BF16)
        layer = layer_of(weight, bias, (fp8_form if stored == "fp8" else _int8)(stored, form))
        try:
            select_compute(layer, [layer], quantization, DEVICE)
        except ValueError as problem:
            picks[quantization] = str(problem)
            continue
        gemm = getattr(layer.format, "gemm", None)
        picks[quantization] = gemm.name if gemm is not None else layer.format.name
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32760, 75600])
    parser.add_argument("--chunks", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ops = select_row_ops(DEVICE)
    found = ways(ops)
    results: dict[str, object] = {"row_ops": ops.name, "chosen": chosen()}
    print(f"row steps: {ops.name}; chosen here: {results['chosen']}")
    with torch.inference_mode():
        for tokens in options.tokens:
            for chunk in options.chunks:
                block = {way.name: 0.0 for way in found}
                for shape in SHAPES:
                    timed = measure(shape, tokens, chunk, found, options.repeats)
                    results[f"{tokens} tokens, chunk {chunk}, {shape.title}"] = timed
                    print(f"\n{tokens} tokens in chunks of {chunk}: {shape.title} ({shape.inputs} -> {shape.outputs})")
                    for name, result in timed.items():
                        print(f"  {name:<38} " + "  ".join(f"{key} {value}" for key, value in result.items()))
                        block[name] += PER_BLOCK[shape.title] * float(result.get("milliseconds", float("nan")))
                results[f"{tokens} tokens, chunk {chunk}, block"] = {
                    name: {"milliseconds": round(took, 2), "of_bf16": round(took / block["bf16"], 3)}
                    for name, took in block.items()
                    if took == took
                }
                print(f"\nall layers of a block: {results[f'{tokens} tokens, chunk {chunk}, block']}")
    print(save_results("quantized_linears", results))


if __name__ == "__main__":
    main()
