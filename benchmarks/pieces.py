"""What pieces of a step cost: products by their rows, attention by its queries, and steps by how they are cut.

    python benchmarks/pieces.py /tmp/fp8.safetensors --out /tmp/pieces.json
    python benchmarks/pieces.py /tmp/fp8.safetensors --size 720p --parts attention,steps --out /tmp/pieces_720p.json

Wan 14B at 480x832x81 or 720x1280x81 with all blocks streamed as in 2.6 or 4.0 GiB, but with all VRAM there, so that any
pieces fit. Products and attention are computed in tiles, and those of one more row may need a whole round of the GPU's
processors more: steps are made with spans of queries that fill such rounds, and with even ones. `--tiny` runs a tiny
model on the CPU: for trying the script.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from draws import TINY
from exact_step import limit_seconds, multiplier
from lowvram_video.attention.backend import AttentionSpec
from lowvram_video.attention.select import select_attention
from lowvram_video.memory.plan.footprint import WorkSize
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.system.processors import processors_of
from lowvram_video.system.rounds import QUERY_TILE
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import machine
from synthetic import write_checkpoint

STEPS = 1
PRODUCT_ROWS = (7416, 7920, 7936, 8184, 8192, 8208, 8448, 10920, 15864, 16368, 16376, 16384, 16896, 32760)
QUERY_TILES = (32, 33, 49, 50, 56, 60, 64, 66, 98, 99, 100, 115, 116, 120, 124, 128, 132)
HEADS = (8, 40)
REPEATS = 10
SIZES = {"480p": (WorkSize(81, 480, 832), 2.6), "720p": (WorkSize(81, 720, 1280), 4.0)}  # and GiB


@dataclass(frozen=True)
class Pieces:
    """How a step is cut: as `Choice` says, and whether spans of queries fill rounds of the GPU's processors."""

    token_chunk: int
    head_groups: int
    query_chunk: int | None
    in_rounds: bool

    def __str__(self) -> str:
        spans = "in rounds" if self.in_rounds else "even"
        return f"{self.token_chunk} rows, {self.head_groups} groups, {self.query_chunk} queries, {spans}"


WAYS = (
    Pieces(8192, 5, 16384, False),
    Pieces(8192, 5, 16384, True),
    Pieces(16384, 1, 8192, False),
    Pieces(16384, 1, 8192, True),
    Pieces(8192, 1, 16384, True),
    Pieces(16384, 5, 16384, True),
)


def product_rows(config: WanConfig, device: torch.device) -> list[dict[str, Any]]:
    """Nanoseconds for each row of the products of a block, of so many rows at a time."""
    shapes = [(config.dim, config.dim), (config.dim, config.ffn_dim), (config.ffn_dim, config.dim)]
    found = []
    for shape in shapes:
        multiply = multiplier("bf16", device)
        for rows in PRODUCT_ROWS:
            call = multiply(rows, *shape)
            call()
            seconds = min(timed(call, device) for _ in range(REPEATS))
            found.append({"shape": shape, "rows": rows, "ns_per_row": 1e9 * seconds / rows})
    return found


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call that is waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def query_rows(config: WanConfig, work: WorkSize, device: torch.device) -> list[dict[str, Any]]:
    """TFLOP/s of attention of so many queries of some heads to all keys, by the backend that the model takes."""
    attend = select_attention("auto", AttentionSpec(device, torch.bfloat16, config.head_dim)).attend
    q, k, v = (
        torch.randn(1, work.rows, config.num_heads, config.head_dim, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    found = []
    for heads in HEADS:
        for tiles in QUERY_TILES:
            count = min(work.rows, tiles * QUERY_TILE)

            def call() -> object:
                return attend(q[:, :count, :heads], k[:, :, :heads], v[:, :, :heads])  # noqa: B023

            flops = 4 * count * work.rows * heads * config.head_dim
            repeats = max(2, int(2e14 / flops))  # a third of a second, in which the GPU's clock settles

            def calls() -> None:
                for _ in range(repeats):  # noqa: B023
                    call()

            call()
            found.append({"heads": heads, "queries": count, "tflops": repeats * flops / timed(calls, device) / 1e12})
    return found


def step_seconds(model: StreamedWan, plan: MemoryPlan, pieces: Pieces, device: torch.device) -> dict[str, Any]:
    """Seconds of the steps of one way after the first, and what they made."""
    choice = replace(
        plan.choice,
        token_chunk=pieces.token_chunk,
        head_groups=pieces.head_groups,
        query_chunk=pieces.query_chunk,
    )
    work = plan.work
    model.start(replace(plan, choice=choice))
    processors = processors_of(device) if pieces.in_rounds else None
    model.model.execution = replace(model.model.execution, processors=processors)
    generator = torch.Generator(device).manual_seed(0)
    latent = torch.randn(1, 16, *work.latent_size, device=device, generator=generator)
    text = torch.randn(1, 512, model.config.text_dim, device=device, generator=generator)
    timestep = torch.full((1,), 700.0, device=device)
    made: list[torch.Tensor] = []
    seconds = [timed(lambda: made.append(model(latent, timestep, text)), device) for _ in range(STEPS + 1)][1:]
    checksum = float(made[-1].double().sum())
    return {**asdict(pieces), "step": min(seconds), "steps": seconds, "checksum": checksum}


def table(found: dict[str, Any]) -> str:
    lines = [f"{'product':<16}{'rows':>7}{'ns/row':>9}"]
    lines += [f"{row['shape']!s:<16}{row['rows']:>7}{row['ns_per_row']:>9.1f}" for row in found["products"]]
    lines.append(f"{'heads':<8}{'queries':>8}{'TFLOP/s':>9}")
    lines += [f"{row['heads']:<8}{row['queries']:>8}{row['tflops']:>9.1f}" for row in found["attention"]]
    lines.append(f"{'s/step':>8}{'x limit':>9}  pieces (limit {found['limit']:.3f} s)")
    for row in found["steps"]:
        pieces = Pieces(row["token_chunk"], row["head_groups"], row["query_chunk"], row["in_rounds"])
        lines.append(f"{row['step']:>8.3f}{row['step'] / found['limit']:>9.3f}  {pieces}, sum {row['checksum']:.6g}")
    return "\n".join(lines)


@torch.inference_mode()
def measure(
    path: Path, work: WorkSize, gib: float, device: torch.device, parts: list[str], ways: int, out: Path
) -> None:
    """Everything, kept as it comes; the table last."""
    config = WanConfig()
    found: dict[str, Any] = {"machine": machine(), "products": [], "attention": [], "steps": [], "limit": 1.0}
    if device.type == "cuda":
        found["products"] = product_rows(config, device) if "products" in parts else []
        found["attention"] = query_rows(config, work, device) if "attention" in parts else []
        found["limit"] = limit_seconds(config, work, "bf16", device)
    write_file(out, json.dumps(found, indent=1).encode())
    if "steps" in parts:
        model = StreamedWan(path, RunSettings(device=device))
        limits = limits_for(device, vram_budget_gib=gib, fused=True, blocks_to_swap=model.footprint().num_blocks)
        plan = model.make_plan(work, limits)
        for pieces in WAYS[:ways]:
            found["steps"].append(step_seconds(model, plan, pieces, device))
            write_file(out, json.dumps(found, indent=1).encode())
        model.release()
    print(table(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp8", type=Path, nargs="?", help="Wan 14B fp8 file (see synthetic.py)")
    parser.add_argument("--size", choices=SIZES, default="480p")
    parser.add_argument("--parts", default="products,attention,steps", help="with commas between")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="only the first so many ways to cut a step")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path, default=Path("pieces.json"))
    options = parser.parse_args()
    parts = options.parts.split(",")
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.safetensors"
            write_checkpoint(path, TINY["14b"], "fp8", "cpu")
            measure(path, WorkSize(9, 64, 64), 2.6, torch.device("cpu"), parts, options.ways, options.out)
        return
    measure(options.fp8, *SIZES[options.size], torch.device("cuda", 0), parts, options.ways, options.out)


if __name__ == "__main__":
    main()
