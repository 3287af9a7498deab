"""A denoising step against its limit: what its products and its attention take by themselves, measured in the same run.

    python benchmarks/exact_step.py /tmp --rows "480p resident,480p in 2.6" --out /tmp/exact_step.json

Files of random weights are made in the folder where they are missing. Each file's rows run in one process, which reads
it once; beside it another process holds the VRAM that a row may not use. The limit is a loop over the shapes of a pass
with nothing between them: products of bf16 numbers, or of fp8 numbers that are there already, and attention on the
backend that the model takes; before the rows and again after them, and the quicker of the two counts.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lowvram_video.attention.backend import AttentionSpec
from lowvram_video.attention.select import select_attention
from lowvram_video.memory.plan.footprint import GIB, Limits, WorkSize
from lowvram_video.memory.plan.limits import hold_allocator, hold_budget, limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.linear.compute import select_compute
from measure import Ballast, Watch, machine

VIDEO, HD, CLIP = (81, 480, 832), (81, 720, 1280), (17, 480, 832)
FILES = {"fp8": "fp8.safetensors", "Q4_K": "q4_k.gguf", "bf16": "bf16.safetensors"}
LIMIT_SECONDS = 0.8
NUM_COPIES, COPIED_BYTES = 8, 600 << 20  # about what the blocks of a bf16 file have
# Kinds of kernels, by what their names contain; the first that matches decides.
KINDS = (
    ("copies from RAM", r"Memcpy HtoD"),
    ("attention", r"sdpa|flash|fmha|attention|_attn"),
    ("unpacking", r"dequant|unpack|q\d_(k|0|1)"),
    ("8-bit rows", r"_quantize|_rescale"),
    ("norms and rotation", r"_norm(ed)?_kernel|_rms|layer_norm"),
    ("gated sums", r"_gated_add|_add_norm"),
    ("GELU", r"_gelu"),
    ("LoRA", r"_down_kernel|_up_kernel"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas"),
    ("copies and sums", r"Memcpy|copy|elementwise|Memset|CatArray|reduce"),
)


@dataclass(frozen=True)
class Row:
    """One line. `vram_gib` 0: unlimited, all blocks resident; else all blocks are streamed."""

    name: str
    file: str
    size: tuple[int, int, int]  # frames, height, width
    vram_gib: float = 0
    quantization: str = "none"
    attention: str = "auto"
    steps: int = 3
    profile: bool = False
    num_slots: int | None = None  # of the ring


ROWS = (
    Row("480p in 2.6", "fp8", VIDEO, 2.6, profile=True),
    Row("480p resident", "fp8", VIDEO, profile=True),
    Row("480p fp8_fast", "fp8", VIDEO, quantization="fp8_fast", profile=True),
    Row("720p in 4.0", "fp8", HD, 4.0, steps=1),
    Row("720p resident", "fp8", HD, steps=1),
    Row("720p fp8_fast", "fp8", HD, quantization="fp8_fast", steps=1),
    Row("480p 8-bit k and v in 2.3", "fp8", VIDEO, 2.3, quantization="fp8_fast", profile=True),
    Row("720p 8-bit k and v in 3.5", "fp8", HD, 3.5, quantization="fp8_fast", steps=1),
    Row("480p Q4_K", "Q4_K", VIDEO, profile=True),
    Row("480p Q4_K fp8_fast", "Q4_K", VIDEO, quantization="fp8_fast", profile=True),
    Row("clip bf16 in 4", "bf16", CLIP, 4.0, steps=8),
    Row("clip bf16 in 5, 4 slots", "bf16", CLIP, 5.0, steps=8, num_slots=4),
)


def limit_seconds(config: WanConfig, work: WorkSize, products: str, device: torch.device) -> float:
    """A step of nothing but the products (of "bf16" or "fp8" numbers) and the attention of its blocks."""
    rows, dim, dtype = work.rows, config.dim, torch.bfloat16
    multiply, attend = multiplier(products, device), select_attention("auto", AttentionSpec(device, dtype, 128)).attend
    shapes = [(dim, dim)] * 6 + [(dim, config.ffn_dim), (config.ffn_dim, dim)]
    calls = [multiply(rows, *shape) for shape in shapes]
    q, k, v = (torch.randn(1, rows, config.num_heads, 128, device=device, dtype=dtype) for _ in range(3))

    def block() -> None:
        for call in calls:
            call()
        attend(q, k, v)
        attend(q, k[:, :512], v[:, :512])

    block()
    torch.cuda.synchronize(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < LIMIT_SECONDS:
        for _ in range(2):
            block()
        torch.cuda.synchronize(device)
        count += 2
    return (time.perf_counter() - began) / count * config.num_layers


def link_gbps(device: torch.device, busy: bool) -> float:
    """What pinned memory is copied at, extent after extent as blocks are; while products run, where `busy`."""
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    multiply, copies = multiplier("bf16", device)(8192, 5120, 13824), torch.cuda.Stream(device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    multiply()
    torch.cuda.synchronize(device)
    if busy:
        for _ in range(NUM_COPIES * 20):  # of 1.5 ms each, so that they outlast the copies
            multiply()
    with torch.cuda.stream(copies):
        start.record()
        for _ in range(NUM_COPIES):
            there.copy_(host, non_blocking=True)
        stop.record()
    torch.cuda.synchronize(device)
    return NUM_COPIES * COPIED_BYTES / start.elapsed_time(stop) / 1e6


def multiplier(products: str, device: torch.device) -> Callable[[int, int, int], Callable[[], object]]:
    """`(rows, in, out) ->` a call that multiplies numbers of this shape; inputs of one shape share their memory.

    The numbers are of the size that a model's are: how fast a GPU runs depends on the bits that it moves.
    """
    made: dict[tuple[int, ...], torch.Tensor] = {}
    outs: dict[tuple[int, int], torch.Tensor] = {}

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        if shape not in made:
            made[shape] = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(scale)
        return made[shape]

    def of(rows: int, inputs: int, outputs: int) -> Callable[[], object]:
        x, weight, bias = tensor(rows, inputs), tensor(outputs, inputs, scale=0.7 / inputs**0.5), tensor(outputs)
        out = outs.setdefault((rows, outputs), x.new_empty(rows, outputs))
        if products == "bf16":
            return lambda: torch.addmm(bias, x, weight.t(), out=out)
        # as row-wise scales make them: the largest of a row is fp8's largest
        x8, weight8 = ((t * (448 / t.abs().amax(1, keepdim=True))).to(torch.float8_e4m3fn) for t in (x, weight))
        a, b = (torch.full(shape, 1e-4, device=device) for shape in ((rows, 1), (1, outputs)))
        return lambda: torch._scaled_mm(
            x8, weight8.t(), scale_a=a, scale_b=b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True, out=out
        )

    return of


class Bench:
    """One file's model, read once, and what its rows take."""

    def __init__(self, path: Path, rows: Sequence[Row], device: torch.device, free_bytes: int):
        self.device, self.rows, self.path = device, rows, path
        self.free_at_start = free_bytes  # before this process had a context
        self.rates = limits_for(device, vram_budget_gib=100, fused=True)
        self.model: StreamedWan | None = None
        self.settings = RunSettings(device=device)

    def limits(self) -> dict[str, float]:
        """`{"frames x height x width, products": seconds}`."""
        hold_allocator(self.device, None)
        config = WanConfig()
        wanted = {(row.size, "fp8" if row.quantization == "fp8_fast" else "bf16") for row in self.rows}
        found = {}
        for size, products in sorted(wanted):
            work = WorkSize(*size)
            found[limit_key(size, products)] = limit_seconds(config, work, products, self.device)
            torch.cuda.empty_cache()
        return found

    def run(self, row: Row) -> dict[str, Any]:
        """What the row took; a failure is a result too."""
        taken = self.free_at_start - torch.cuda.mem_get_info(self.device)[0]
        with Ballast(row.vram_gib and row.vram_gib - taken / GIB) as ballast:
            try:
                found = self._steps(row, taken + ballast.free_bytes)
            except (ValueError, RuntimeError) as error:
                found = {"error": str(error)[:300]}
        assert self.model is not None
        self.model.stop()
        torch.cuda.empty_cache()
        return {**asdict(row), **found}

    def _steps(self, row: Row, given_bytes: int) -> dict[str, Any]:
        limits = replace(
            self.rates,
            vram_budget_bytes=int((row.vram_gib or 120) * GIB),
            blocks_to_swap=WanConfig().num_layers if row.vram_gib else 0,
            num_slots=row.num_slots,
        )
        hold(self.device, limits, row.vram_gib > 0)
        model, work = self._model(row), WorkSize(*row.size)
        with Watch() as watch:
            plan = model.make_plan(work, limits)
            model.start(plan)
            generator = torch.Generator(self.device).manual_seed(0)
            latent = torch.randn(1, 16, *work.latent_size, device=self.device, generator=generator)
            text = torch.randn(1, 512, model.config.text_dim, device=self.device, generator=generator)
            timestep = torch.full((1,), 700.0, device=self.device)

            # as a run waits: what is copied for the next pass goes on meanwhile
            wait = torch.cuda.current_stream().synchronize

            def step() -> float:
                wait()
                began = time.perf_counter()
                self.velocity = model(latent, timestep, text)
                wait()
                return time.perf_counter() - began

            seconds = [step() for _ in range(row.steps + 1)]
        final = model.plan
        assert final is not None
        used = given_bytes - watch.min_free
        return {
            "seconds": [round(s, 4) for s in seconds],
            "step": statistics.median(seconds[1:]),
            "vram_gib_used": used / GIB,
            "predicted_gib": final.denoise.total / GIB,
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "retried": final is not plan,
            "choice": asdict(final.choice),
            "memory": {name: round(size / GIB, 3) for name, size in asdict(final.denoise).items()},
            "ring_slots": final.blocks.num_slots,
            "streamed": final.blocks.num_streamed,
            "streamed_bytes": final.blocks.streamed_bytes,
            "h2d_gbps": limits.h2d_gbps,
            "checksum": float(self.velocity.double().sum()),
            "finite": bool(self.velocity.isfinite().all()),
            "kernels": profiled(step) if row.profile else {},
        }

    def _model(self, row: Row) -> StreamedWan:
        settings = RunSettings(device=self.device, quantization=row.quantization, attention_mode=row.attention)
        if self.model is None:
            self.model = StreamedWan(self.path, settings)
        elif settings != self.settings:
            busy = self.model.costs.busy_modules
            self.model.quantization = select_compute(self.model.model, busy, row.quantization, self.device)
            self.model.model.execution = settings.execution(self.model.config.head_dim)
            self.model.settings = settings
        self.settings = settings
        torch.cuda.reset_peak_memory_stats()
        return self.model


def hold(device: torch.device, limits: Limits, limited: bool) -> None:
    if limited:
        hold_budget(device, limits)
    else:
        hold_allocator(device, None)


def limit_key(size: Sequence[int], products: str) -> str:
    return f"{'x'.join(map(str, size))} {products}"


def profiled(step: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of one step by kind of kernel, and of the kernels that take most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = step()
    kinds: collections.Counter[str] = collections.Counter()
    names: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next((kind for kind, words in KINDS if re.search(words, event.name, re.IGNORECASE)), "other")
            kinds[kind] += event.device_time / 1e3
            each = names[event.name[:100]]
            each[0] += event.device_time / 1e3
            each[1] += 1
    most = sorted(names.items(), key=lambda item: -item[1][0])[:30]
    return {
        "step": seconds,
        "kinds": {kind: round(ms, 2) for kind, ms in kinds.most_common()},
        "names": {name: [round(ms, 2), count] for name, (ms, count) in most},
    }


@torch.inference_mode()
def run_file(path: Path, rows: Sequence[Row], out: Path) -> None:
    """The limits, then the rows, those that may use least first, then the limits again; kept as they come."""
    with Ballast(0) as other:  # its context is there before and after
        _run_file(Bench(path, rows, torch.device("cuda", 0), other.free_bytes), rows, out)


def _run_file(bench: Bench, rows: Sequence[Row], out: Path) -> None:
    link = {name: link_gbps(bench.device, name == "busy") for name in ("alone", "busy")}
    found: dict[str, Any] = {"link_gbps": link, "limits": bench.limits(), "rows": []}
    for row in rows:
        began = time.perf_counter()
        found["rows"].append(bench.run(row))
        found["rows"][-1]["wall"] = time.perf_counter() - began
        write_file(out, json.dumps(found).encode())
    found["limits_after"] = bench.limits()
    write_file(out, json.dumps(found).encode())


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line per row: against the limit with the same products, and against the resident row of the same work."""
    limits: dict[str, float] = {}
    for result in results:
        for key, seconds in result["limits"].items():
            limits[key] = min(seconds, result.get("limits_after", {}).get(key, seconds), limits.get(key, seconds))
    rows = [row for result in results for row in result["rows"]]
    lines = [f"{'row':<28}{'s/step':>8}{'limit':>8}{'ratio':>7}{'VRAM':>7}{'plan':>7}{'off':>7}  choice"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['name']:<28} FAILED {row['error']}")
            continue
        limit = limits[limit_key(row["size"], "fp8" if row["quantization"] == "fp8_fast" else "bf16")]
        if row["streamed"]:
            limit = max(limit, row["streamed_bytes"] / row["h2d_gbps"] / 1e9)
        off = 100 * (row["predicted_gib"] / row["vram_gib_used"] - 1)
        choice = " ".join(f"{name}={value}" for name, value in row["choice"].items())
        lines.append(
            f"{row['name']:<28}{row['step']:>8.3f}{limit:>8.3f}{row['step'] / limit:>7.3f}{row['vram_gib_used']:>7.2f}"
            f"{row['predicted_gib']:>7.2f}{off:>+6.1f}%  {'RETRIED ' if row['retried'] else ''}{choice}"
        )
        if row["kernels"]:
            total = sum(row["kernels"]["kinds"].values())
            kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in row["kernels"]["kinds"].items())
            lines.append(f"    ms of {total:.0f}: {kinds}")
    lines += [f"limit {key}: {seconds:.3f} s" for key, seconds in limits.items()]
    for result in results:
        rates = ", ".join(f"{gbps:.1f} GB/s {name}" for name, gbps in result["link_gbps"].items())
        lines.append(f"copies from pinned memory in the process of {result['file']}: {rates}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files of random weights are, or are made")
    parser.add_argument(
        "--rows", help=f"how their names begin, with commas between: {'; '.join(row.name for row in ROWS)}"
    )
    parser.add_argument("--out", type=Path, default=Path("exact_step.json"))
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    words = options.rows.split(",") if options.rows else [""]
    chosen = [row for row in ROWS if any(row.name.startswith(word) for word in words)]
    if options.file:
        rows = [row for row in chosen if row.file == options.file]
        run_file(options.folder / FILES[options.file], rows, options.out)
        return
    results = []
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for file in dict.fromkeys(row.file for row in chosen):
        path = options.folder / FILES[file]
        if not path.exists():
            script = str(Path(__file__).with_name("synthetic.py"))
            subprocess.run([sys.executable, script, "14b", file, str(path)], check=True)
        part = options.out.with_name(
            f"{options.out.stem}_{file}.json"
        )  # written after each row: what was measured is kept
        command = [sys.executable, __file__, str(options.folder), "--file", file, "--out", str(part)]
        part.unlink(missing_ok=True)
        subprocess.run([*command, *(("--rows", options.rows) if options.rows else ())], check=False, env=env)
        if part.exists():
            results.append({"file": file, **json.loads(part.read_text())})
        write_file(options.out, json.dumps({"machine": machine(), "files": results}, indent=1).encode())
    print(table(results))


if __name__ == "__main__":
    main()
