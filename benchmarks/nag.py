"""What negative guidance (NAG) adds to a step of Wan: passes with it and without it, in turn.

python benchmarks/synthetic.py 14b fp8 /tmp/fp8.safetensors
python benchmarks/nag.py /tmp/fp8.safetensors --out /tmp/nag.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lowvram_video.memory.plan.limits import hold_budget, limits_for
from lowvram_video.runtime.settings import RunSettings, use_device
from lowvram_video.system.atomic_files import write_file
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.wanvideo.footprint import WanWork
from lowvram_video.wanvideo.network.model import Extras, Nag
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import machine


@torch.inference_mode()
def measured(
    path: Path, size: tuple[int, int, int], rounds: int, device: torch.device, vram_gib: float
) -> dict[str, Any]:
    """Seconds of `rounds` passes of either kind after one to warm up, and what guidance changed."""
    model = StreamedWan(path, RunSettings(device=device))
    limits = limits_for(device, vram_budget_gib=vram_gib or None, fused=device.type == "cuda")
    if vram_gib:
        hold_budget(device, limits)
    work = WanWork(*size, passes_per_step=2, nag=True)
    plan = model.make_plan(work, limits)
    model.start(plan)
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    config = model.config
    latent, text, negative = (
        randn(1, config.in_channels, *work.latent_size),
        *(randn(1, config.text_tokens, config.text_dim) for _ in range(2)),
    )
    kinds = {"without": Extras(), "with": Extras(nag=Nag(negative, NagSettings()))}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    velocities = {}
    for _ in range(rounds + 1):
        for kind, extras in kinds.items():
            wait_for(device)
            began = time.perf_counter()
            velocities[kind] = model(latent, torch.full((1,), 700.0, device=device), text, extras=extras)
            wait_for(device)
            seconds[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(each[1:]) for kind, each in seconds.items()}
    effect = (velocities["with"] - velocities["without"]).norm() / velocities["without"].norm()
    final = model.plan
    assert final is not None
    return {
        "size": size,
        "seconds": {kind: [round(each, 4) for each in found] for kind, found in seconds.items()},
        "median": medians,
        "added": medians["with"] / medians["without"] - 1,
        "effect": float(effect),
        "retried": final is not plan,
        "streamed": final.blocks.num_streamed,
        "head_groups": final.choice.head_groups,
    }


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a Wan transformer")
    parser.add_argument("--size", default="81x480x832", help="frames x height x width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vram", type=float, default=0.0, metavar="GIB", help="a budget (0: all that is free)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("nag.json"))
    options = parser.parse_args()
    frames, height, width = map(int, options.size.split("x"))
    device = use_device(options.device)
    found = measured(options.file, (frames, height, width), options.rounds, device, options.vram)
    date = datetime.date.today().isoformat()
    write_file(options.out, json.dumps({"date": date, "machine": machine(), **found}, indent=1).encode())
    without, guided = (found["median"][kind] for kind in ("without", "with"))
    print(f"{'size':<14}{'without':>10}{'with NAG':>10}{'added':>8}")
    print(f"{options.size:<14}{without:>10.3f}{guided:>10.3f}{100 * found['added']:>+7.2f}%")


if __name__ == "__main__":
    main()
