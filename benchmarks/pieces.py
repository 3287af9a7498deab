"""What pieces of a step cost: products by how many rows they have, and steps by how they are cut into pieces.

    python benchmarks/pieces.py /tmp/fp8.safetensors --out /tmp/pieces.json

Wan 14B at 480x832x81 with all blocks streamed as in 2.6 GiB, but with all VRAM there, so that any pieces fit. A product
is computed in tiles, and those of one more row may need a whole round of the GPU's processors more. `--tiny` runs
a tiny model on the CPU: for trying the script.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from draws import TINY
from exact_step import limit_seconds, multiplier
from lowvram_video.memory.plan.footprint import WorkSize
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.transformer import rows as row_ranges
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import machine
from synthetic import write_checkpoint

BUDGET_GIB = 2.6
STEPS = 3
PRODUCT_ROWS = (7416, 7920, 7936, 8184, 8192, 8208, 8448, 10920, 15864, 16368, 16376, 16384, 16896, 32760)
REPEATS = 10


@dataclass(frozen=True)
class Pieces:
    """How a step is cut: as `Choice` says, and what numbers of rows are multiples of (`rows.py: TILE_ROWS`)."""

    token_chunk: int
    head_groups: int
    query_chunk: int | None
    tile_rows: int = row_ranges.TILE_ROWS

    def __str__(self) -> str:
        return f"{self.token_chunk} rows, {self.head_groups} groups, {self.query_chunk} queries, by {self.tile_rows}"


WAYS = (
    Pieces(8192, 5, 16384),
    Pieces(8448, 5, 16896, 264),
    Pieces(8192, 2, 16384),
    Pieces(8448, 2, 16896, 264),
    Pieces(8448, 1, 16896, 264),
    Pieces(16384, 5, 16384),
    Pieces(16896, 2, 16896, 264),
    Pieces(32768, 1, None),
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


@contextmanager
def tiles_of(rows: int) -> Iterator[None]:
    """Pieces are of multiples of so many rows meanwhile."""
    before, row_ranges.TILE_ROWS = row_ranges.TILE_ROWS, rows
    try:
        yield
    finally:
        row_ranges.TILE_ROWS = before


def step_seconds(model: StreamedWan, plan: MemoryPlan, pieces: Pieces, device: torch.device) -> dict[str, Any]:
    """Seconds of the steps of one way after the first, and what they made."""
    choice = replace(
        plan.choice,
        token_chunk=pieces.token_chunk,
        head_groups=pieces.head_groups,
        query_chunk=pieces.query_chunk,
    )
    work = plan.work
    with tiles_of(pieces.tile_rows):
        model.start(replace(plan, choice=choice))
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
    lines.append(f"{'s/step':>8}{'x limit':>9}  pieces (limit {found['limit']:.3f} s)")
    for row in found["steps"]:
        pieces = Pieces(row["token_chunk"], row["head_groups"], row["query_chunk"], row["tile_rows"])
        lines.append(f"{row['step']:>8.3f}{row['step'] / found['limit']:>9.3f}  {pieces}, sum {row['checksum']:.6g}")
    return "\n".join(lines)


@torch.inference_mode()
def measure(path: Path, work: WorkSize, device: torch.device, out: Path) -> None:
    """Everything, kept as it comes; the table last."""
    config = WanConfig()
    found: dict[str, Any] = {"machine": machine(), "products": [], "steps": [], "limit": 1.0}
    if device.type == "cuda":
        found["products"] = product_rows(config, device)
        found["limit"] = limit_seconds(config, work, "bf16", device)
    model = StreamedWan(path, RunSettings(device=device))
    limits = limits_for(device, vram_budget_gib=BUDGET_GIB, fused=True, blocks_to_swap=model.footprint().num_blocks)
    plan = model.make_plan(work, limits)
    for pieces in WAYS:
        found["steps"].append(step_seconds(model, plan, pieces, device))
        write_file(out, json.dumps(found, indent=1).encode())
    model.release()
    print(table(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp8", type=Path, nargs="?", help="Wan 14B fp8 file (see synthetic.py)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path, default=Path("pieces.json"))
    options = parser.parse_args()
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.safetensors"
            write_checkpoint(path, TINY["14b"], "fp8", "cpu")
            measure(path, WorkSize(9, 64, 64), torch.device("cpu"), options.out)
        return
    measure(options.fp8, WorkSize(81, 480, 832), torch.device("cuda", 0), options.out)


if __name__ == "__main__":
    main()
