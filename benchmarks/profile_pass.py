"""Where the time of one denoising pass goes: kernels of the device by total time, against the arithmetic's floor.

python benchmarks/profile_pass.py /tmp/14b_fp8.safetensors --frames 81 --height 480 --width 832
"""

from __future__ import annotations

import argparse
import collections
import time

import torch
from lowvram_video.memory.plan.footprint import WorkSize
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan

MATMUL_TFLOPS, ATTENTION_TFLOPS = 816, 574  # the best that an H200 reached


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--vram-budget", type=float, default=60)
    parser.add_argument("--blocks-to-swap", type=int, default=-1)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    work = WorkSize(options.frames, options.height, options.width)
    limits = limits_for(device, vram_budget_gib=options.vram_budget, blocks_to_swap=options.blocks_to_swap, fused=True)
    model = StreamedWan(options.path, RunSettings(device=device))
    plan = model.make_plan(work, limits)
    model.start(plan)
    latent = torch.randn(1, model.config.in_channels, *work.latent_size, device=device)
    text = torch.randn(1, 512, model.config.text_dim, device=device)
    timestep = torch.full((1,), 700.0, device=device)
    model(latent, timestep, text)
    torch.cuda.synchronize()
    began = time.perf_counter()
    model(latent, timestep, text)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(latent, timestep, text)
        torch.cuda.synchronize()
    totals: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name[:90]] += event.device_time
            counts[event.name[:90]] += 1
    for name, microseconds in totals.most_common(25):
        print(f"{microseconds / 1e3:9.1f} ms {counts[name]:6d} x  {name}")
    products, attention = model.footprint().pass_flops(work, plan.choice.cache_text_kv)
    floor = products / MATMUL_TFLOPS / 1e12 + attention / ATTENTION_TFLOPS / 1e12
    busy = sum(totals.values()) / 1e6
    print(f"pass {seconds:.3f} s, floor {floor:.3f} s (ratio {seconds / floor:.2f}), kernels {busy:.3f} s")


if __name__ == "__main__":
    main()
