"""What must hold of streaming besides speed: equal bits, no host synchronisation, no growth, fast loading.

python benchmarks/soundness.py /tmp/14b_fp8.safetensors --small /tmp/1.3b_fp8.safetensors
"""

from __future__ import annotations

import argparse
import collections
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from lowvram_video.memory.plan.footprint import GIB, Limits, WorkSize
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.report.stream_log import StreamLog
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import disk_gbps, drop_page_cache, save_results
from torch import Tensor

DEVICE = torch.device("cuda", 0)
CLIP = WorkSize(17, 480, 832)


def inputs(model: StreamedWan, work: WorkSize) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded latent, timestep and text."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    latent = torch.randn(1, model.config.in_channels, *work.latent_size, device=DEVICE, generator=generator)
    text = torch.randn(1, 512, model.config.text_dim, device=DEVICE, generator=generator)
    return latent, torch.full((1,), 700.0, device=DEVICE), text


def equal_bits(path: str, limits: Limits) -> dict[str, object]:
    """One pass each: all resident, all streamed, half streamed, text keys and values cached, from disk."""
    model = StreamedWan(path, RunSettings(device=DEVICE))
    outputs = {}
    for name, swap, ram, cache in (
        ("resident", 0, None, False),
        ("streamed", 40, None, False),
        ("half streamed", 20, None, False),
        ("text cached", 40, None, True),
        ("from disk", 40, 6 * GIB, False),
    ):
        plan = model.make_plan(CLIP, replace(limits, blocks_to_swap=swap, ram_budget_bytes=ram))
        choice = replace(plan.choice, cache_text_kv=cache, token_chunk=4096, head_groups=5)
        plan = replace(plan, choice=choice)
        model.start(plan)
        arguments = inputs(model, CLIP)
        model(*arguments)
        outputs[name] = model(*arguments)
        model.release()
    reference = outputs["resident"]
    return {f"{name} = resident": bool(torch.equal(output, reference)) for name, output in outputs.items()}


def host_syncs(path: str, limits: Limits) -> dict[str, object]:
    """CUDA calls of a streamed pass that make the host wait, from a profiler trace; overlap from event timings."""
    model = StreamedWan(path, RunSettings(device=DEVICE))
    logs = [StreamLog()]
    plan = model.make_plan(CLIP, replace(limits, blocks_to_swap=40))
    model.start_fitting(plan, lambda spans: logs[-1].add(spans))
    arguments = inputs(model, CLIP)
    model(*arguments)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(*arguments)
    torch.cuda.set_sync_debug_mode("default")
    names = collections.Counter(event.name for event in profile.events())
    waits = {name: count for name, count in names.items() if "ynchronize" in name and "StreamWaitEvent" not in name}
    allocations = torch.cuda.memory_stats()["num_device_alloc"] - reserved
    model.settle()
    logs.append(StreamLog())
    began = time.perf_counter()
    passes = 3
    for _ in range(passes):
        model(*arguments)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    model.settle()
    stream = logs[-1].report()
    assert stream is not None
    model.release()
    return {
        "host synchronisations in a pass": sum(waits.values()),
        "which": dict(waits),
        "device allocations in a pass": allocations,
        "seconds per pass": seconds / passes,
        "copy GB/s": stream.gbps,
        "overlap percent": stream.overlap_percent,
        "stall ms per pass": stream.stall_ms_per_pass,
    }


def steady(path: str, limits: Limits, runs: int = 20) -> dict[str, object]:
    """Open, read, run, release, over and over: VRAM, RSS and pinned bytes after each run."""
    seen = []
    for _ in range(runs + 2):
        model = StreamedWan(path, RunSettings(device=DEVICE))
        model.start(model.make_plan(CLIP, replace(limits, blocks_to_swap=30)))
        model(*inputs(model, CLIP))
        pinned = model.pinned_bytes
        torch.cuda.synchronize()
        model.release()
        del model
        torch.cuda.empty_cache()
        seen.append((torch.cuda.mem_get_info()[0], psutil.Process().memory_info().rss, pinned))
    seen = seen[2:]  # libraries load in the first runs
    free, rss, pinned = zip(*seen, strict=True)
    return {
        "runs": runs,
        "VRAM spread percent": 100 * (max(free) - min(free)) / max(free),
        "RSS spread percent": 100 * (max(rss) - min(rss)) / max(rss),
        "pinned spread percent": 100 * (max(pinned) - min(pinned)) / max(pinned),
        "RSS GiB": max(rss) / GIB,
    }


def loading(path: str, limits: Limits) -> dict[str, object]:
    """File to first step, past the page cache, against what dd reads at."""
    disk = disk_gbps(Path(path))
    drop_page_cache(Path(path))
    began = time.perf_counter()
    model = StreamedWan(path, RunSettings(device=DEVICE))
    model.start(model.make_plan(CLIP, replace(limits, blocks_to_swap=40)))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    size = Path(path).stat().st_size
    streamed = sum(layout.nbytes for layout in model.weights.layouts)
    pinned = model.pinned_bytes
    model.release()
    return {
        "seconds": seconds,
        "GB/s": size / seconds / 1e9,
        "dd GB/s": disk,
        "of dd": size / seconds / 1e9 / disk,
        "pinned over streamed file bytes": pinned / streamed,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="Wan 14B fp8 file")
    parser.add_argument("--small", required=True, help="Wan 1.3B fp8 file")
    options = parser.parse_args()
    limits = limits_for(DEVICE, vram_budget_gib=60, fused=True)
    results = {
        "passes": host_syncs(options.path, limits),
        "bits": equal_bits(options.path, limits),
        "steady": steady(options.small, limits),
        # after the others: a virtual machine may have to grow its memory first
        "loading": loading(options.path, limits),
    }
    path = save_results("soundness", results)
    for title, result in results.items():
        for name, value in result.items():
            print(f"{title:<9}{name:<36}{value:.3f}" if isinstance(value, float) else f"{title:<9}{name:<36}{value}")
    print(path)


if __name__ == "__main__":
    main()
