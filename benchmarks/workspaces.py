"""What kernels take of VRAM beside their operands: attention backends by shape, PyTorch's sums over many rows, and
libraries outside the allocator.

    python benchmarks/workspaces.py --out workspaces.json

"beside" is the allocator's peak in a call less what was there before and less the output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lowvram_video.attention.backend import AttentionSpec, Backend
from lowvram_video.attention.select import ATTENTION_MODES, AttentionUnavailable, select_attention
from lowvram_video.fused.select import select_fused_ops
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.stream.pinned import CudaRegistrar
from lowvram_video.system.host_memory import allocate_extent
from lowvram_video.system.processors import threads_of
from lowvram_video.weights.kernels.gemms import fuses_gelu, select_fp8_gemm, select_int8_gemm
from lowvram_video.weights.kernels.rows import select_row_ops
from measure import Ballast, machine

MIB = 2**20
DEVICE = torch.device("cuda", 0)
PINNED_BYTES = 4 << 30


@dataclass(frozen=True)
class Shape:
    """Attention of `rows` over `keys` tokens, for `heads` of a tensor of `all_heads`."""

    rows: int
    keys: int
    heads: int
    all_heads: int
    head_dim: int = 128


SHAPES = (
    Shape(32760, 32760, 40, 40),
    Shape(32760, 32760, 10, 40),
    Shape(6612, 6612, 8, 40),
    Shape(6611, 6611, 40, 40),
    Shape(14175, 14175, 12, 12),
    Shape(32760, 512, 40, 40),
    Shape(8192, 32760, 40, 40),
    Shape(27072, 27072, 4, 12),
    Shape(11136, 11136, 8, 40),
)
# Of keys `[B, L, H, D]`, of which attention takes the mean over L.
SUMMED = (
    (1, 27030, 4, 128), (1, 14175, 12, 128), (1, 32760, 40, 128), (1, 75600, 40, 128), (1, 75600, 4, 128),
    (1, 6612, 8, 128), (1, 2000, 1, 128), (1, 3000, 3, 128), (2, 9000, 5, 128), (1, 5000, 4, 64), (1, 27030, 12, 80),
    (1, 1000, 40, 128),
)  # fmt: skip


def peak_of(call: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Bytes of a call's result, and the most that it had beside that and what was there before."""
    call()  # libraries make their workspaces once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    output = out.untyped_storage().nbytes()
    return output, torch.cuda.max_memory_allocated() - before - output


def attention(backend: Backend, shape: Shape) -> dict[str, Any]:
    """What one call takes, of heads out of a wider tensor."""
    lengths = (shape.rows, shape.keys, shape.keys)
    q, k, v = (
        torch.randn(1, n, shape.all_heads, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)[:, :, : shape.heads]
        for n in lengths
    )
    output, beside = peak_of(lambda: backend.attend(q, k, v))
    elements = shape.rows * shape.heads * shape.head_dim
    return {
        "backend": backend.name,
        **asdict(shape),
        "output_per_element": output / elements,
        "beside_mib": beside / MIB,
        "beside_per_element": beside / elements,
    }


def attentions() -> list[dict[str, Any]]:
    """Every backend that runs here, with every shape."""
    results = []
    for mode in ATTENTION_MODES:
        try:
            backend = select_attention(mode, AttentionSpec(DEVICE, torch.bfloat16, 128))
        except AttentionUnavailable as error:
            print(f"{mode}: {str(error)[:120]}")
            continue
        if mode == "auto":
            continue
        results += [attention(backend, shape) for shape in SHAPES]
        torch.cuda.empty_cache()
    return results


def sums() -> list[dict[str, Any]]:
    """What the mean over tokens takes, of whole tensors and of heads out of wider ones."""
    results: list[dict[str, Any]] = []
    for batch, tokens, heads, head_dim in SUMMED:
        for wider, dtype in ((1, torch.bfloat16), (2, torch.bfloat16), (1, torch.float32)):
            k = torch.ones(batch, tokens, wider * heads, head_dim, device=DEVICE, dtype=dtype)[:, :, :heads]
            _, beside = peak_of(lambda k=k: k.mean(dim=1, keepdim=True))
            results.append({"shape": [batch, tokens, heads, head_dim], "of_heads": wider * heads,
                            "dtype": str(dtype).removeprefix("torch."), "bytes": beside})  # fmt: skip
    return results


def context_steps(free_bytes: int) -> list[dict[str, Any]]:
    """What is outside PyTorch's allocator after each thing that loads libraries, and what the allocator keeps."""
    x = weight = torch.empty(0)
    steps: list[dict[str, Any]] = []

    def note(name: str, call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        outside = free_bytes - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
        kept = torch.cuda.memory_allocated()
        steps.append({"after": name, "outside_mib": outside / MIB, "allocated_mib": kept / MIB})

    def operands() -> None:
        nonlocal x, weight
        x = torch.randn(8192, 5120, device=DEVICE, dtype=torch.bfloat16)
        weight = torch.randn(5120, 5120, device=DEVICE, dtype=torch.bfloat16)

    def scaled() -> torch.Tensor:
        one = torch.ones((), device=DEVICE)
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    def pin() -> None:
        extents.append(allocate_extent(PINNED_BYTES))
        registrar.pin(extents[0])

    def unpin() -> None:
        registrar.unpin(extents[0])

    extents: list[torch.Tensor] = []
    registrar = CudaRegistrar(DEVICE)
    spec = AttentionSpec(DEVICE, torch.bfloat16, 128)
    note("context", lambda: torch.zeros(1, device=DEVICE))
    note("operands", operands)
    note("product", lambda: torch.mm(x, weight))
    note("product and bias", lambda: torch.addmm(x[0], x, weight.t()))
    note("GELU", lambda: fuses_gelu(DEVICE))
    note("GELU in a product", lambda: torch._addmm_activation(x[0], x, weight.t(), use_gelu=True))
    note("fp32 product", lambda: torch.mm(x.float(), weight.float()))
    note("limits", lambda: limits_for(DEVICE, vram_budget_gib=60))
    note("attention", lambda: select_attention("auto", spec))
    note("fused", lambda: select_fused_ops(DEVICE))
    note("rows", lambda: select_row_ops(DEVICE))
    note("fp8", scaled)
    note("fp8 gemm", lambda: select_fp8_gemm(DEVICE, select_row_ops(DEVICE)))
    note("int8 gemm", lambda: select_int8_gemm(DEVICE, select_row_ops(DEVICE)))
    for length in (2000, 6612, 14175, 32760):
        note(
            f"attention of {length}",
            lambda length=length: attention(select_attention("sdpa", spec), Shape(length, length, 40, 40)),
        )
    note("pinned 4 GiB", pin)
    note("unpinned", unpin)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with Ballast(0) as ballast, torch.inference_mode():
        steps = context_steps(ballast.free_bytes)
        results, summed = attentions(), sums()
    report = {"machine": machine(), "threads": threads_of(DEVICE), "steps": steps, "attention": results, "sums": summed}
    options.out.write_text(json.dumps(report, indent=1))
    for line in summed:
        print(f"the mean over tokens of {line['shape']} in {line['dtype']}: {line['bytes'] / MIB:.1f} MiB")
    for step in steps:
        print(f"{step['after']:<24}{step['outside_mib']:>10.1f} MiB outside{step['allocated_mib']:>10.1f} allocated")
    for r in results:
        print(
            f"{r['backend']:<14}{r['rows']:>7} x{r['keys']:>6}, {r['heads']:>2} of {r['all_heads']} heads: output "
            f"{r['output_per_element']:.2f}, beside {r['beside_per_element']:.3f} bytes an element, "
            f"{r['beside_mib']:.1f} MiB"
        )


if __name__ == "__main__":
    main()
