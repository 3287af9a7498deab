"""A card that is smaller than the plan believes, at 20 sizes: every pass ends right, or in one line that says why not.

    python benchmarks/tight_budgets.py /tmp/1.3b_bf16.safetensors --out tight_budgets.json

Plans are made for the whole card, and PyTorch's allocator is then held to less: from what the plan wants down to less
than the leanest plan has. Passes run out of memory for real, and are repeated with leaner plans. Each result is
compared with that of the whole card; after each budget the VRAM is back, and a pass on the whole card right again.
`--tiny` runs a tiny model on a CPU, where nothing runs out of memory: for trying the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from draws import TINY
from lowvram_video.memory.plan.limits import hold_allocator
from lowvram_video.memory.plan.plan import PlanError
from lowvram_video.runtime.run_limits import run_limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.system.device_errors import is_out_of_memory
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import bench_device, machine
from random_draws import repeats_of
from synthetic import CONFIGS, write_checkpoint
from torch import Tensor

GIB = 2**30


class Card:
    """A model and a pass of it, whose allocator may be held."""

    def __init__(self, path: Path, size: tuple[int, int, int], device: torch.device):
        self.device, self.size = device, size
        self.model = StreamedWan(path, RunSettings(device))
        config = self.model.config
        generator = torch.Generator().manual_seed(1)
        self.work = wan_work(config, size)
        self.latent = torch.randn(1, config.out_channels, *self.work.latent_size, generator=generator).to(device)
        self.text = torch.randn(1, config.text_tokens, config.text_dim, generator=generator).to(device)
        limits = run_limits(self.model.settings, self.model.model.execution)
        self.plan = self.model.make_plan(self.work, limits)

    def hold(self, allowed: int | None) -> None:
        """Let PyTorch have so many bytes; None: all of the card."""
        if self.device.type == "cuda":
            hold_allocator(self.device, allowed)

    def make(self) -> Tensor:
        """A pass, started anew by the plan for the whole card."""
        self.model.start_fitting(self.plan)
        timestep = torch.full((1,), 500.0, device=self.device)
        return self.model(self.latent, timestep, self.text).float().cpu()

    def leave(self) -> int:
        """Stop; bytes that PyTorch still has beyond what this script holds."""
        self.model.stop()
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)


def run_budget(card: Card, allowed: int, whole: Tensor, idle: int) -> dict[str, Any]:
    """One budget's outcome."""
    row: dict[str, Any] = {"allowed_gib": round(allowed / GIB, 3)}
    began = time.perf_counter()
    with repeats_of("lowvram_video.runtime.streamed") as repeats:
        card.hold(allowed)
        try:
            made = card.make()
            error = float((made - whole).abs().max() / whole.abs().max())
            row |= {"outcome": "same bits" if torch.equal(made, whole) else "right", "error": error}
            if not error < 0.02:
                row["outcome"] = "WRONG"
        except PlanError as refusal:
            row |= {"outcome": "refused", "message": str(refusal).splitlines()[0][:200]}
        except RuntimeError as error:
            kind = "out of memory, said" if is_out_of_memory(error) else "FAILED"
            row |= {"outcome": kind, "message": str(error).splitlines()[0][:200]}
        row["repeats"] = repeats.count
    row["left_bytes"] = card.leave() - idle
    card.hold(None)
    row["seconds"] = round(time.perf_counter() - began, 2)
    row["right_again"] = torch.equal(card.make(), whole)
    card.leave()
    return row


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = bench_device()
    config = TINY["1.3b"] if options.tiny else CONFIGS["1.3b"]
    if not options.model.exists():
        write_checkpoint(options.model, config, "bf16", device.type)
    card = Card(options.model, tuple(options.size), device)
    whole = card.make()
    wanted = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else card.plan.denoise.total
    idle = card.leave()
    rows = []
    for number in range(options.budgets):
        share = 1.0 - (1.0 - options.least) * number / (options.budgets - 1)
        rows.append(run_budget(card, int(wanted * share), whole, idle))
        print(rows[-1], flush=True)
    card.model.release()
    return {"machine": machine(), "size": options.size, "wanted_gib": wanted / GIB, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", type=int, nargs=3, default=[832, 480, 33], metavar=("WIDTH", "HEIGHT", "FRAMES"))
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--least", type=float, default=0.05, help="the smallest budget, in what the plan uses")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options)
    if options.out is not None:
        write_file(options.out, json.dumps(result, indent=1).encode())
    rows = result["rows"]
    outcomes = Counter(row["outcome"] for row in rows)
    sound = all(row["right_again"] and row["left_bytes"] == 0 for row in rows)
    print(f"{len(rows)} budgets: {dict(outcomes)}; repeats {sum(row['repeats'] for row in rows)}")
    print("as wanted" if sound and not {"WRONG", "FAILED"} & outcomes.keys() else "NOT as wanted")


if __name__ == "__main__":
    main()
