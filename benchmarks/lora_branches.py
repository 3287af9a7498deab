"""What LoRAs beside the linear layers of a Wan 14B block cost: per layer against its product and the memory's floor.

python benchmarks/lora_branches.py             # 480x832x81 in chunks of 8192, ranks 64 and 256; under a minute
python benchmarks/lora_branches.py --sweep     # also tiles that are no candidates, to choose those that are; minutes

"old" reads x for every layer and passes over every product by PyTorch; "new" is what runs: q, k and v read x once, GELU
comes with the pass over the product, and each step is the fastest of PyTorch's and Triton's. The floor is the new way's
bytes at the speed of a device copy, or its operations at that of a bf16 product, measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from lowvram_video.card.forms import Form
from lowvram_video.card.products import layer_input
from lowvram_video.fused.ops import FusedOps
from lowvram_video.fused.select import select_fused_ops
from lowvram_video.system.kernel_choice import disagreement, reason_against
from lowvram_video.weights.kernels.gemms import fp8_refusal, select_fp8_gemm
from lowvram_video.weights.kernels.low_rank_ops import RANKS, STEPS, ChosenLowRankOps, Probe, select_low_rank_ops
from lowvram_video.weights.kernels.low_rank_reference import TORCH, LowRankOps
from lowvram_video.weights.kernels.rows import select_row_ops
from lowvram_video.weights.linear.fp8 import Fp8Matmul
from lowvram_video.weights.linear.linear import Linear, project_gelu, project_together
from lowvram_video.weights.linear.low_rank import DOWN, SCALE, UP
from lowvram_video.weights.linear.projection import Projection
from measure import save_results
from quantized_linears import BF16, DEVICE, PER_BLOCK, SHAPES, Shape, fp8_form, layer_of
from torch import Tensor, nn

NUM_BLOCKS = 40
PROBED = (*RANKS, 192)  # and that of q, k and v together


@dataclass(frozen=True)
class Speeds:
    """What this device reads and writes, and multiplies in bf16, per second."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


def medians(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that the clock's changes meet all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 2):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            if number >= 2:
                times[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def measured_speeds() -> Speeds:
    source = torch.zeros(1 << 28, device=DEVICE, dtype=torch.int32)  # 1 GiB
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=DEVICE).to(BF16) for _ in range(2))
    times = medians({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 7)
    return Speeds(2 * source.nbytes / times["copy"], 2 * 8192**3 / times["product"])


@dataclass(frozen=True)
class Bench:
    """Layers that read the same rows, with and without an update, and what they write to."""

    shape: Shape
    chunk: int
    x: Tensor
    outs: Sequence[Tensor]
    bare: Linear
    with_lora: Linear
    fused: FusedOps

    @property
    def has_gelu(self) -> bool:
        return self.shape.title == "ffn.0"

    def chunks(self) -> list[slice]:
        num_rows = self.x.shape[0]
        step = -(-num_rows // -(-num_rows // self.chunk))
        return [slice(first, first + step) for first in range(0, num_rows, step)]

    def prepared(self, layer: Linear) -> list[Projection]:
        return [layer.prepare(BF16) for _ in self.outs]

    def run(self, layer: Linear) -> None:
        projections = self.prepared(layer)
        for rows in self.chunks():
            outs = [out[rows] for out in self.outs]
            if self.has_gelu:
                project_gelu(projections[0], self.x[rows], outs[0], self.fused.gelu_)
            else:
                project_together(projections, self.x[rows], outs)

    def run_old(self) -> None:
        """Every layer reads the rows, and a pass of its own adds the update."""
        down, up, scale = (getattr(self.with_lora, name) for name in (DOWN, UP, SCALE))
        projections = self.prepared(self.bare)
        for rows in self.chunks():
            x = self.x[rows]
            quantized = projections[0].quantize(x)
            for project, out in zip(projections, self.outs, strict=True):
                y = project.multiply(quantized, out=out[rows])
                y.addmm_((x @ down.t()).mul_(scale), up.t())
                if self.has_gelu:
                    self.fused.gelu_(y)

    def floor(self, rank: int, speeds: Speeds) -> float:
        """Seconds that the new way adds at least: x once for all layers, y read and written but where GELU does so."""
        rows, layers = self.x.shape[0], self.shape.num_layers
        down = speeds.seconds(2.0 * self.x.numel(), 2.0 * self.x.numel() * rank * layers)
        outputs = rows * self.shape.outputs
        up = speeds.seconds(4.0 * outputs, 2.0 * outputs * rank)
        if self.has_gelu:
            up -= speeds.seconds(4.0 * outputs, 0.0)
        return down + layers * up


def bench_of(shape: Shape, tokens: int, chunk: int, rank: int, form: Form, fused: FusedOps, ops: LowRankOps) -> Bench:
    generator = torch.Generator(DEVICE).manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator)

    weight, x, bias = layer_input(shape.inputs, shape.outputs, tokens, DEVICE, BF16)
    layers = [layer_of(weight, bias, form) for _ in range(2)]
    factors = {
        DOWN: draw(rank, shape.inputs).div_(shape.inputs**0.5).to(BF16),
        UP: draw(shape.outputs, rank).div_(4 * rank**0.5).to(BF16),
        SCALE: torch.full((rank,), 0.8, device=DEVICE),
    }
    for name, factor in factors.items():
        setattr(layers[1], name, nn.Parameter(factor, requires_grad=False))
    layers[1].low_rank_ops = ops
    outs = [torch.empty(tokens, shape.outputs, device=DEVICE, dtype=BF16) for _ in range(shape.num_layers)]
    return Bench(shape, chunk, x, outs, layers[0], layers[1], fused)


def measure(bench: Bench, rank: int, speeds: Speeds, repeats: int) -> dict[str, float]:
    bench.run_old()
    before = bench.outs[0][:512].double()
    bench.run(bench.with_lora)
    difference = float((bench.outs[0][:512].double() - before).norm() / before.norm())
    times = medians(
        {"product": lambda: bench.run(bench.bare), "old": bench.run_old, "new": lambda: bench.run(bench.with_lora)},
        repeats,
    )
    old, new, floor = times["old"] - times["product"], times["new"] - times["product"], bench.floor(rank, speeds)
    return {
        "product_ms": round(1e3 * times["product"], 3),
        "old_ms": round(1e3 * old, 3),
        "new_ms": round(1e3 * new, 3),
        "floor_ms": round(1e3 * floor, 3),
        "new_of_floor": round(new / floor, 2),
        "old_percent": round(100 * old / times["product"], 1),
        "new_percent": round(100 * new / times["product"], 1),
        "new_from_old": round(difference, 5),
    }


def steps_alone(candidates: Sequence[LowRankOps], rank: int) -> dict[str, dict[str, str]]:
    """Each step by PyTorch and by every candidate, on a chunk; GB/s of what the step must read and write."""
    small, large = (Probe(DEVICE, rank, num_rows, features=5120) for num_rows in (70, 8192))
    found: dict[str, dict[str, str]] = {}
    for step, passes in zip(STEPS, (1, 2, 2), strict=True):
        found[step.__name__] = {}

        def wrong(ops: LowRankOps) -> str | None:
            return reason_against(lambda: disagreement(small.error(step, ops)), DEVICE)  # noqa: B023 - called at once

        for ops in (TORCH, *(ops for ops in candidates if wrong(ops) is None)):
            took = large.seconds(step, ops)
            rate = passes * large.x.nbytes / took / 1e9
            found[step.__name__][ops.name] = f"{1e6 * took:.0f} us, {rate:.0f} GB/s"
    return found


def candidates_here(sweep: bool) -> list[LowRankOps]:
    if importlib.util.find_spec("triton") is None:
        return []
    from lowvram_video.weights.kernels.low_rank import CANDIDATES, TritonLowRankOps
    from lowvram_video.weights.kernels.tile import Tile

    if not sweep:
        return list(CANDIDATES)
    down = [
        Tile(m, n, k, warps, stages)
        for m, n, k, (warps, stages) in itertools.product((32, 64, 128), (64, 128, 256), (64, 128), ((4, 4), (8, 3)))
    ]
    up = [
        Tile(m, n, 64, warps, stages)
        for m, n, (warps, stages) in itertools.product((32, 64, 128), (64, 128, 256), ((4, 2), (8, 2), (4, 1), (8, 1)))
    ]
    return [TritonLowRankOps(*tiles) for tiles in zip(down, up, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--step-seconds", type=float, default=2.48, help="of a step without LoRA, for the percentage")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("lora_branches.py times kernels of a GPU, and PyTorch finds none here; run it where one is")
    rows, fused, ops = select_row_ops(DEVICE), select_fused_ops(DEVICE), select_low_rank_ops(DEVICE)
    form = Form("bf16", pack=lambda weight: {"weight": weight})
    if fp8_refusal(DEVICE) is None:
        form = fp8_form("fp8", Fp8Matmul(select_fp8_gemm(DEVICE, rows), rows))
    with torch.inference_mode():
        speeds = measured_speeds()
        print(f"copy {speeds.bytes_per_s / 1e12:.2f} TB/s, bf16 product {speeds.flops_per_s / 1e12:.0f} TFLOP/s")
        chosen = {str(c.rank): [c.down.name, c.up.name, c.up_gelu.name] for c in ops.choices} if isinstance(
            ops, ChosenLowRankOps
        ) else {"all": [ops.name]}  # fmt: skip
        results: dict[str, object] = {
            "terabytes_per_s": round(speeds.bytes_per_s / 1e12, 2),
            "teraflops": round(speeds.flops_per_s / 1e12),
            "weights": form.name,
            "chosen": chosen,
        }
        print(f"chosen by rank (down, up, up with GELU): {chosen}")
        for rank in PROBED:
            results[f"steps, rank {rank}"] = alone = steps_alone(candidates_here(options.sweep), rank)
            for step, found in alone.items():
                print(f"rank {rank}, {step}: " + "; ".join(f"{name} {took}" for name, took in found.items()))
        for rank in options.ranks:
            block = {"product_ms": 0.0, "old_ms": 0.0, "new_ms": 0.0, "floor_ms": 0.0}
            print(f"\nrank {rank}, {options.tokens} rows in chunks of {options.chunk}, weights in {form.name}")
            for shape in SHAPES:
                bench = bench_of(shape, options.tokens, options.chunk, rank, form, fused, ops)
                results[f"rank {rank}, {shape.title}"] = figures = measure(bench, rank, speeds, options.repeats)
                title = f"{shape.title} ({shape.inputs} -> {shape.outputs})"
                print(f"  {title:<24} " + "  ".join(f"{name} {value}" for name, value in figures.items()))
                for name in block:
                    block[name] += PER_BLOCK[shape.title] * figures[name]
            total = {name: round(took, 2) for name, took in block.items()}
            for name in ("old", "new", "floor"):
                share = 100 * NUM_BLOCKS * block[f"{name}_ms"] / 1e3 / options.step_seconds
                total[f"{name}_percent_of_step"] = round(share, 2)
            results[f"rank {rank}, block"] = total
            print(f"  a block: {total}")
    print(save_results("lora_branches", results))


if __name__ == "__main__":
    main()
