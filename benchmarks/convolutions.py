"""The convolutions of Wan's VAE and the steps between them, in every form that PyTorch has: time, memory, bits.

    python benchmarks/convolutions.py --out results.json

Three forms of one causal 3x3x3 convolution of one frame: over six frames (four at a time, two of history), as a
two-dimensional one over three frames' channels, and over a ring of three frames. Each by cuDNN's own choice and by its
timing. `bits` says whether a kernel's result is that of PyTorch's steps, to the bit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lowvram_video.fused import frame_kernels
from torch import Tensor

GIB = 2**30
BF16 = torch.bfloat16

# in, out, rows, columns, kernel (time, height, width)
SHAPES = (
    (96, 96, 720, 1280, (3, 3, 3)),
    (96, 96, 120, 1280, (3, 3, 3)),
    (192, 192, 360, 640, (3, 3, 3)),
    (192, 192, 60, 640, (3, 3, 3)),
    (192, 384, 180, 320, (3, 3, 3)),
    (384, 384, 180, 320, (3, 3, 3)),
    (384, 384, 30, 320, (3, 3, 3)),
    (384, 384, 90, 160, (3, 3, 3)),
    (384, 384, 15, 160, (3, 3, 3)),
    (384, 768, 180, 320, (3, 1, 1)),
    (96, 3, 720, 1280, (3, 3, 3)),
    (3, 96, 720, 1280, (3, 3, 3)),
    (192, 96, 720, 1280, (1, 3, 3)),
    (384, 192, 360, 640, (1, 3, 3)),
    (256, 256, 360, 640, (3, 3, 3)),
    (512, 512, 180, 320, (3, 3, 3)),
    (1024, 1024, 90, 160, (3, 3, 3)),
)
TINY = ((32, 32, 6, 8, (3, 3, 3)), (32, 64, 6, 8, (3, 1, 1)), (32, 16, 6, 8, (1, 3, 3)))
NORM_CHANNELS = (96, 128, 160, 192, 256, 320, 384, 512, 640, 1024)


class Bench:
    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = torch.device(device), repeats
        self.rows: list[dict[str, Any]] = []

    def rand(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
        return torch.randn(*shape, device=self.device, dtype=dtype).contiguous(memory_format=layout)

    def measure(
        self, what: str, work: Callable[[], object], flops: float = 0.0, moved: float = 0.0, **more: Any
    ) -> None:
        row: dict[str, Any] = {"what": what, **more}
        try:
            work()
            seconds, scratch = self._timed(work)
            row |= {"ms": round(1e3 * seconds, 4), "scratch_mib": round(scratch / 2**20, 1)}
            if flops:
                row["tflops"] = round(flops / seconds / 1e12, 1)
            if moved:
                row["gbps"] = round(moved / seconds / 1e9)
        except RuntimeError as error:
            row["error"] = str(error).splitlines()[0][:120]
        self.rows.append(row)
        print(row, flush=True)

    def _timed(self, work: Callable[[], object]) -> tuple[float, int]:
        if self.device.type == "cpu":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began, 0
        work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.repeats, torch.cuda.max_memory_allocated() - before


def convolutions(bench: Bench, shape: tuple[int, int, int, int, tuple[int, int, int]]) -> None:
    """Every form of one convolution; the time is of one frame."""
    inward, outward, rows, columns, (kt, kh, kw) = shape
    name = f"{inward}->{outward} {rows}x{columns} {kt}{kh}{kw}"
    flops = 2.0 * inward * outward * kt * kh * kw * rows * columns
    weight, bias = bench.rand(outward, inward, kt, kh, kw), bench.rand(outward)
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    height = rows + kh - 1
    forms: dict[str, tuple[Callable[[], object], int]] = {}
    if kt == 3:
        six = bench.rand(1, inward, 6, rows, columns)
        forms["six frames"] = (lambda: F.conv3d(six, weight, bias, padding=(0, kh // 2, kw // 2)), 4)
        forms["six frames, no bias"] = (lambda: F.conv3d(six, weight, None, padding=(0, kh // 2, kw // 2)), 4)
        three = bench.rand(1, inward, 3, height, columns)
        forms["ring"] = (lambda: F.conv3d(three, weight, None, padding=(0, 0, kw // 2)), 1)
    wide = bench.rand(1, kt * inward, height, columns)
    forms["2-D"] = (lambda: F.conv2d(wide, flat, None, padding=(0, kw // 2)), 1)
    padded = bench.rand(1, kt * inward, height, columns + kw - 1)
    forms["2-D, padded"] = (lambda: F.conv2d(padded, flat), 1)
    for form, (work, frames) in forms.items():
        for timed in (False, True):
            torch.backends.cudnn.benchmark = timed
            bench.measure(name, lambda: work(), flops * frames, form=form, timed=timed, frames=frames)  # noqa: B023 - called at once
            bench.rows[-1]["ms_per_frame"] = round(bench.rows[-1].get("ms", 0.0) / frames, 4)
    torch.backends.cudnn.benchmark = False
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def eager_norm(x: Tensor, bias: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    y = x + bias.view(1, -1, 1, 1)
    length = torch.linalg.vector_norm(y, dim=1, keepdim=True, dtype=torch.float32)
    scale = y.shape[1] ** 0.5 / length.clamp_min_(1e-12)
    return F.silu(torch.mul(y, scale, out=out).mul_(gamma.view(-1, 1, 1)), inplace=True)


def steps_between(bench: Bench, channels: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Norm and SiLU, and the sum of a block, eagerly and as kernels; whether their bits are the same."""
    x, y = (bench.rand(1, channels, rows, columns, dtype=dtype) for _ in range(2))
    bias, gamma, other_bias = (bench.rand(channels, dtype=dtype) for _ in range(3))
    wide = bench.rand(1, 3 * channels, rows, columns, dtype=dtype)
    out = wide[:, channels : 2 * channels]
    want, got = torch.empty_like(x), torch.empty_like(x)
    ops = frame_kernels.TritonFrameOps(exact_exp=bench.device.type == "cuda")

    eager_norm(x, bias, gamma, want)
    ops.norm_silu(x, bias, gamma, got)
    different = int((got != want).sum())
    moved, name = 2.0 * x.nbytes, f"norm {channels} {rows}x{columns} {dtype}".replace("torch.", "")
    bench.measure(name, lambda: eager_norm(x, bias, gamma, want), moved=moved, form="eager")
    more = {"different": different, "of": got.numel()}
    bench.measure(name, lambda: ops.norm_silu(x, bias, gamma, got), moved=moved,
                  form="kernel", **more)  # fmt: skip
    bench.measure(name, lambda: ops.norm_silu(x, bias, gamma, out), moved=moved,
                  form="kernel into a third")  # fmt: skip
    wanted = (x + bias.view(1, -1, 1, 1)) + (y + other_bias.view(1, -1, 1, 1))
    summed = x.clone()
    ops.add_(summed, bias, y.clone(), other_bias)
    different = int((summed != wanted).sum())

    def add() -> None:
        ops.add_(summed.copy_(x), bias, y, None)

    bench.measure(f"sum {channels} {rows}x{columns}", add, moved=5.0 * x.nbytes, form="kernel and a copy",
                  different=different)  # fmt: skip


def others(bench: Bench, small: bool) -> None:
    """Enlarging, attention of the middle, and frames on their way to RAM."""
    rows, columns, channels = (6, 8, 32) if small else (360, 640, 192)
    x = bench.rand(1, channels, rows, columns)
    enlarged = bench.rand(1, channels, 2 * rows, 2 * columns)
    bench.measure("enlarge", lambda: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), moved=5.0 * x.nbytes,
                  form="interpolate")  # fmt: skip

    def spread() -> None:
        for dy in range(2):
            for dx in range(2):
                enlarged[:, :, dy::2, dx::2] = x

    bench.measure("enlarge", spread, moved=5.0 * x.nbytes, form="four copies")
    source = x[0].permute(1, 2, 0)[:, None, :, None].expand(rows, 2, columns, 2, channels)
    target = enlarged[0].permute(1, 2, 0).view(rows, 2, columns, 2, channels)
    bench.measure("enlarge", lambda: target.copy_(source), moved=5.0 * x.nbytes, form="one copy")
    tokens, dim = (64, 32) if small else (90 * 160, 384)
    q, k, v = (torch.randn(1, 1, tokens, dim, device=bench.device, dtype=BF16) for _ in range(3))
    bench.measure("attention", lambda: F.scaled_dot_product_attention(q, k, v), 4.0 * tokens**2 * dim)
    frame = bench.rand(1, 3, rows, columns)
    bench.measure("frame to bytes on the device", lambda: to_bytes(frame))
    pinned = torch.empty(rows, columns, 3, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    bench.measure("bytes to RAM", lambda: pinned.copy_(to_bytes(frame), non_blocking=True))


def to_bytes(frame: Tensor) -> Tensor:
    return (frame[0].float() + 1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with small numbers")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    bench = Bench("cpu" if options.tiny else "cuda", options.repeats)
    with torch.inference_mode():
        for channels in (32,) if options.tiny else NORM_CHANNELS:
            rows, columns = (6, 8) if options.tiny else (720, 1280) if channels == 96 else (90, 640)
            for dtype in (BF16, torch.float16):
                steps_between(bench, channels, rows, columns, dtype)
        others(bench, options.tiny)
        for shape in TINY if options.tiny else SHAPES:
            convolutions(bench, shape)
            if options.out is not None:
                options.out.write_text(json.dumps(bench.rows, indent=1))
    for row in bench.rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
