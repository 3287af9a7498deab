"""Streamed against all-resident Wan denoising, with the VRAM really limited by a second process.

    python benchmarks/synthetic.py 14b fp8 /tmp/14b_fp8.safetensors
    python benchmarks/streaming.py /tmp/14b_fp8.safetensors --bf16 /tmp/14b_bf16.safetensors

Every line is a process of its own. "vram" is what it used of the whole device, CUDA context and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from lowvram_video.memory.plan.footprint import GIB, WorkSize
from lowvram_video.memory.plan.limits import hold_budget, limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.lora.file import LoraChoice
from measure import Ballast, Watch, disk_gbps, drop_page_cache, run_cases


@dataclass(frozen=True)
class Case:
    """One line of the table. `vram_gib` 0: unlimited and all blocks resident."""

    name: str
    path: str
    frames: int
    height: int
    width: int
    vram_gib: float = 0
    ram_gib: float | None = None
    blocks_to_swap: int = -1
    steps: int = 3
    cold: bool = False  # the file is not in the page cache
    quantization: str = "none"
    loras: tuple[str, ...] = ()


def run_case(case: Case, free_bytes: int) -> dict[str, object]:
    """Load, then time `steps` forward passes after a warm-up one; in this process."""
    device = torch.device("cuda")
    work = WorkSize(case.frames, case.height, case.width)
    ram_before = psutil.Process().memory_info().rss
    with torch.inference_mode(), Watch() as watch:
        limits = limits_for(
            device,
            vram_budget_gib=case.vram_gib or 120,
            ram_budget_gib=case.ram_gib,
            blocks_to_swap=case.blocks_to_swap,
            fused=True,
        )
        hold_budget(device, limits)
        context_bytes = free_bytes - torch.cuda.mem_get_info()[0]
        if case.cold:
            drop_page_cache(Path(case.path))
        began = time.perf_counter()
        loras = [LoraChoice(Path(lora)) for lora in case.loras]
        model = StreamedWan(case.path, RunSettings(device=device, quantization=case.quantization), loras=loras)
        plan = model.make_plan(work, limits)
        model.start(plan)
        torch.cuda.synchronize()
        loaded = time.perf_counter() - began
        generator = torch.Generator(device).manual_seed(0)
        latent = torch.randn(1, model.config.in_channels, *work.latent_size, device=device, generator=generator)
        text = torch.randn(1, 512, model.config.text_dim, device=device, generator=generator)
        timestep = torch.full((1,), 700.0, device=device)
        seconds = []
        for _ in range(case.steps + 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            velocity = model(latent, timestep, text)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        pinned = model.pinned_bytes
        final_plan = model.plan
        assert final_plan is not None
    used = free_bytes - watch.min_free
    return {
        **asdict(case),
        "seconds": [round(s, 4) for s in seconds],
        "step": statistics.median(seconds[1:]),
        "load_seconds": loaded,
        "vram_gib_used": used / GIB,
        "predicted_gib": final_plan.denoise.total / GIB,
        "off_percent": 100 * (final_plan.denoise.total / used - 1),
        "context_gib": context_bytes / GIB,
        "allocator_gib": torch.cuda.max_memory_reserved() / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "rss_gib": watch.rss_peak / GIB,  # all of it: interpreter, libraries, weights
        "rss_before_gib": ram_before / GIB,
        "pinned_gib": pinned / GIB,
        "streamed": final_plan.blocks.num_streamed,
        "streamed_bytes": final_plan.blocks.streamed_bytes,
        "retried": final_plan is not plan,
        "token_chunk": final_plan.choice.token_chunk,
        "head_groups": final_plan.choice.head_groups,
        "cache_text_kv": final_plan.choice.cache_text_kv,
        "h2d_gbps": limits.h2d_gbps,
        "rates": [round(limits.tflops_matmul), round(limits.tflops_attention)],
        "finite": bool(velocity.isfinite().all()),
        "checksum": float(velocity.double().sum()),
        "file_gib": Path(case.path).stat().st_size / GIB,
    }


def in_own_process(case: Case, script: str = __file__) -> dict[str, object]:
    """Run a case in a fresh process beside a ballast; a failure is a result too."""
    with Ballast(case.vram_gib) as ballast:
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--free", str(ballast.free_bytes)]
        env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    sys.stderr.write(done.stderr)
    if done.returncode:
        return {**asdict(case), "error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def cases(fp8: str, bf16: str | None) -> list[Case]:
    """The table of the README, then more points for predicted against measured peaks."""
    video, hd, clip = (81, 480, 832), (81, 720, 1280), (17, 480, 832)
    lines = [
        Case("480p resident", fp8, *video),
        Case("480p in 3.5", fp8, *video, vram_gib=3.5, blocks_to_swap=40),
        Case("720p resident", fp8, *hd, steps=2),
        Case("720p in 6.5", fp8, *hd, vram_gib=6.5, blocks_to_swap=40, steps=2),
        Case("480p from disk", fp8, *video, vram_gib=6, ram_gib=6, blocks_to_swap=40, cold=True),
        Case("clip resident", fp8, *clip),
        Case("clip in 4", fp8, *clip, vram_gib=4),
        Case("480p in 6", fp8, *video, vram_gib=6, steps=1),
        Case("480p in 8", fp8, *video, vram_gib=8, steps=1),
        Case("720p in 12", fp8, *hd, vram_gib=12, steps=1),
    ]
    if bf16 is not None:
        lines += [
            Case("clip bf16 resident", bf16, *clip),
            Case("clip bf16 in 4", bf16, *clip, vram_gib=4, blocks_to_swap=40, steps=5),
        ]
    return lines


def table(results: list[dict[str, object]], disk: float) -> str:
    """One line per case; the ratio is to the resident run of the same file and size."""
    resident = {(r["path"], r["frames"], r["height"]): r["step"] for r in results if not r["vram_gib"] and "step" in r}
    lines = [
        f"{'case':<20}{'s/step':>8}{'ratio':>8}{'floor':>7}{'VRAM':>7}{'pred':>7}{'off':>7}{'ctx':>6}{'RSS':>7}{'pin':>7}"
        f"{'load s':>8}{'chunk':>7}{'grp':>4}{'kv':>3}"
    ]
    for r in results:
        if "error" in r:
            lines.append(f"{r['name']:<20} FAILED {r['error']}")
            continue
        own = resident.get((r["path"], r["frames"], r["height"]), r["step"])
        bandwidth = min(disk, r["h2d_gbps"]) if r["ram_gib"] else r["h2d_gbps"]
        floor = max(own, r["streamed_bytes"] / bandwidth / 1e9)
        lines.append(
            f"{r['name']:<20}{r['step']:>8.3f}{r['step'] / own:>8.3f}{r['step'] / floor:>7.3f}"
            f"{r['vram_gib_used']:>7.2f}{r['predicted_gib']:>7.2f}{r['off_percent']:>+6.1f}%{r['context_gib']:>6.2f}{r['rss_gib']:>7.2f}"
            f"{r['pinned_gib']:>7.2f}{r['load_seconds']:>8.1f}{r['token_chunk']:>7}{r['head_groups']:>4}"
            f"{'y' if r['cache_text_kv'] else 'n':>3}{' RETRIED' if r['retried'] else ''}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp8", nargs="?", help="Wan 14B fp8 file (see synthetic.py)")
    parser.add_argument("--bf16", help="Wan 14B bf16 file")
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--free", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)), options.free)))
        return
    disk = disk_gbps(Path(options.fp8))
    chosen = (case for case in cases(options.fp8, options.bf16) if options.only is None or options.only in case.name)
    results, path = run_cases("streaming", chosen, in_own_process, disk_gbps=disk)
    print(f"disk {disk:.2f} GB/s; results in {path}")
    print(table(results, disk))


if __name__ == "__main__":
    main()
