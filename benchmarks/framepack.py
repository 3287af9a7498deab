"""FramePack on a small card: streamed against all-resident steps, and five seconds of video end to end.

    python benchmarks/synthetic.py framepack fp8 /tmp/framepack_fp8.safetensors
    python benchmarks/framepack.py /tmp/framepack_fp8.safetensors

Every line is a process of its own beside one that holds the rest of the VRAM. "vram" is what it used of the whole
device, CUDA context and libraries included. The floor of a step is its FLOPs at the rates that bf16 products and
attention reach by themselves on this machine in large sizes; its limit what the products and the attention of its
blocks take by themselves in their own sizes, as in `exact_step.py`, before and after the steps (the quicker counts).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from exact_step import LIMIT_SECONDS, multiplier, profiled
from lowvram_video.attention.backend import AttentionSpec
from lowvram_video.attention.select import select_attention
from lowvram_video.framepack.footprint import SectionSize
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import Frames, History, Prompt
from lowvram_video.framepack.pipeline import FramePackFiles, FramePackPipeline
from lowvram_video.framepack.request import EncodedInputs, Sampling
from lowvram_video.framepack.run.generation import noise_levels, prepare, section_size
from lowvram_video.framepack.run.host import RunPlaces
from lowvram_video.framepack.run.run import FramePackRun
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.framepack.timed_prompts import parse_timed_prompt
from lowvram_video.framepack.vae.model import HunyuanVAE
from lowvram_video.memory.plan.footprint import GIB
from lowvram_video.memory.plan.limits import hold_budget, limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.weights.lora.file import LoraChoice
from measure import Ballast, Watch, run_cases
from safetensors.torch import save_file

SIZE = (608 // 8, 640 // 8)
TEXT_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """One line. `vram_gib` 0: unlimited and all blocks resident. `seconds` 0: only steps of one section."""

    name: str
    path: str
    vram_gib: float = 0
    blocks_to_swap: int = -1
    steps: int = 4
    seconds: float = 0
    vae: str = ""
    quantization: str = "none"
    loras: tuple[str, ...] = ()
    cache: float | None = None


def random_material(model: StreamedFramePack | None = None) -> EncodedInputs:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return EncodedInputs(
        latent_size=SIZE,
        timed=parse_timed_prompt("any"),
        prompts={"any": Prompt(randn(1, TEXT_TOKENS, 4096), randn(1, 768))},
        start=randn(1, 16, 1, *SIZE),
        start_features=randn(1, 729, 1152),
    )


def sustained_rates(device: torch.device) -> tuple[float, float]:
    """TFLOP/s that bf16 products and attention reach here by themselves, over half a second each, in large sizes."""

    def rate(work: Callable[[], object], flops: float) -> float:
        for _ in range(3):
            work()
        torch.cuda.synchronize(device)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 0.5:
            for _ in range(5):
                work()
            torch.cuda.synchronize(device)
            count += 5
        return flops * count / (time.perf_counter() - began) / 1e12

    x = torch.randn(32768, 3072, device=device, dtype=torch.bfloat16)
    weight = torch.randn(12288, 3072, device=device, dtype=torch.bfloat16)
    out = torch.empty(32768, 12288, device=device, dtype=torch.bfloat16)
    products = rate(lambda: torch.mm(x, weight.t(), out=out), 2.0 * 32768 * 3072 * 12288)

    q = torch.randn(1, 18485, 24, 128, device=device, dtype=torch.bfloat16)
    backend = select_attention("auto", AttentionSpec(device, torch.bfloat16, 128))
    attention = rate(lambda: backend.attend(q, q, q), 4.0 * 18485**2 * 24 * 128)
    torch.cuda.empty_cache()
    return products, attention


def limit_seconds(work: SectionSize, config: FramePackConfig, device: torch.device) -> float:
    """A step of nothing but the products and the attention of its blocks."""
    dim, mlp, text = config.dim, config.mlp_dim, work.context_tokens
    multiply = multiplier("bf16", device)
    of_kind = [(dim, dim)] * 4 + [(dim, mlp), (mlp, dim)]
    double = [multiply(rows, *shape) for rows in (work.tokens - text, text) for shape in of_kind]
    single = [multiply(work.tokens, *shape) for shape in [*[(dim, dim)] * 3, (dim, mlp), (dim + mlp, dim)]]
    q = torch.randn(1, work.tokens, config.num_heads, config.head_dim, device=device, dtype=torch.bfloat16)
    backend = select_attention("auto", AttentionSpec(device, torch.bfloat16, config.head_dim))

    def seconds(calls: list[Callable[[], object]]) -> float:
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < LIMIT_SECONDS:
            for call in calls * 4:
                call()
            torch.cuda.synchronize(device)
            count += 4
        return (time.perf_counter() - began) / count

    calls = [*double, lambda: backend.attend(q, q, q)], [*single, lambda: backend.attend(q, q, q)]
    found = seconds(calls[0]) * config.num_layers + seconds(calls[1]) * config.num_single_layers
    torch.cuda.empty_cache()
    return found


def run_steps(case: Case, free_bytes: int) -> dict[str, object]:
    """One section's conditions, then `steps` passes after a warm-up one."""
    device = torch.device("cuda")
    sampling, given = Sampling(num_steps=case.steps + 1, cache_threshold=None), random_material()
    sections = given.sections(sampling)
    work = replace(section_size(sampling, given.latent_size, given.end is not None), context_tokens=TEXT_TOKENS + 729)
    with torch.inference_mode():
        rates = sustained_rates(device) if not case.vram_gib else (0.0, 0.0)
        alone = [] if case.vram_gib else [limit_seconds(work, FramePackConfig(), device)]
    with torch.inference_mode(), Watch() as watch:
        limits = limits_for(
            device, vram_budget_gib=case.vram_gib or 120, blocks_to_swap=case.blocks_to_swap, fused=True
        )
        hold_budget(device, limits)
        began = time.perf_counter()
        loras = [LoraChoice(Path(lora)) for lora in case.loras]
        model = StreamedFramePack(case.path, RunSettings(device=device, quantization=case.quantization), loras=loras)
        plan = model.make_plan(work, limits)
        conditions = prepare(model, plan, sampling, given, sections)
        prepared = time.perf_counter() - began
        model.start(plan)
        section = sections[0]
        history = torch.randn(1, 16, 19, *SIZE, device=device)
        shown = History(*(
            Frames(latents, torch.tensor(indices))
            for latents, indices in zip(
                (torch.cat([history[:, :, :1], given.start.to(device)], dim=2), history[:, :, 1:3], history[:, :, 3:]),
                (section.indices.clean, section.indices.two, section.indices.four),
                strict=True,
            )
        ))  # fmt: skip
        noisy = Frames(torch.randn(1, 16, 9, *SIZE, device=device), torch.tensor(section.indices.noisy))
        image = conditions.images[0].to(device)
        wait = torch.cuda.current_stream().synchronize  # as a run waits: copies for the next pass go on meanwhile

        def step(number: int) -> float:
            wait()
            began = time.perf_counter()
            model(noisy, shown, conditions.prompts["any"][number], image)
            wait()
            return time.perf_counter() - began

        seconds = [step(number) for number in range(len(noise_levels(sampling, SIZE)) - 1)]
        velocity = model(noisy, shown, conditions.prompts["any"][0], image)
    used, final = free_bytes - watch.min_free, model.plan
    kernels: dict[str, object] = {}
    if not case.vram_gib:
        with torch.inference_mode():
            kernels = profiled(lambda: step(0))
            alone.append(limit_seconds(work, FramePackConfig(), device))
    products, attention = model.footprint().pass_flops(work, False)
    return {
        **asdict(case),
        "seconds_each": [round(s, 4) for s in seconds],
        "step": statistics.median(seconds[1:]),
        "prepare_seconds": prepared,
        "vram_gib_used": used / GIB,
        "predicted_gib": final.denoise.total / GIB,
        "rss_gib": watch.rss_peak / GIB,
        "pinned_gib": model.pinned_bytes / GIB,
        "streamed": final.blocks.num_streamed,
        "streamed_bytes": final.blocks.streamed_bytes,
        "block_bytes": sum(layout.nbytes for layout in model.weights.layouts),
        "tokens": work.tokens,
        "products_tflop": products / 1e12,
        "attention_tflop": attention / 1e12,
        "sustained_tflops": rates,
        "limit_seconds": alone,
        "kernels": kernels,
        "transfer_floor": final.blocks.streamed_bytes / limits.h2d_gbps / 1e9,
        "h2d_gbps": limits.h2d_gbps,
        "token_chunk": final.choice.token_chunk,
        "head_groups": final.choice.head_groups,
        "retried": final is not plan,
        "finite": bool(velocity.isfinite().all()),
        "file_gib": Path(case.path).stat().st_size / GIB,
    }


class Shapes:
    """An output that keeps the sizes of the sections alone."""

    def __init__(self) -> None:
        self.sections: list[list[int]] = []

    @property
    def num_sections(self) -> int:
        return len(self.sections)

    def add(self, frames: torch.Tensor, overlap: int) -> None:
        self.sections.append(list(frames.shape))

    def begin(self, pieces: object, still_open: int) -> None:
        raise AssertionError("no video is extended here")

    def leave(self) -> None:
        return

    def finish(self) -> None:
        return


def run_video(case: Case, free_bytes: int) -> dict[str, object]:
    """The whole pipeline but for text encoders and the mp4."""
    settings = RunSettings(
        device=torch.device("cuda"), vram_budget_gib=case.vram_gib or None, blocks_to_swap=case.blocks_to_swap
    )
    before = psutil.Process().memory_info().rss
    with Watch() as watch, tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        pipeline = FramePackPipeline(FramePackFiles(Path(case.path), Path(case.vae)), settings)
        sampling = Sampling(seconds=case.seconds, num_steps=case.steps, cache_threshold=case.cache)
        given = random_material()
        shapes = Shapes()
        places = RunPlaces(Path(folder), Path(folder), lambda _, __: shapes)
        with FramePackRun.open(pipeline, sampling, given, places) as run:
            run.make()
        seconds = time.perf_counter() - began
    report = pipeline.report()
    return {
        **asdict(case),
        "total_seconds": seconds,
        "sections": shapes.sections,
        "phases": {phase.name: phase.seconds for phase in report.phases},
        "vram_gib_by_phase": {phase.name: report.vram_bytes(phase) / GIB for phase in report.phases},
        "vram_gib_used": (free_bytes - watch.min_free) / GIB,
        "rss_gib": watch.rss_peak / GIB,
        "rss_before_gib": before / GIB,
        "file_gib": Path(case.path).stat().st_size / GIB,
        "predicted_gib": pipeline.plan.denoise.total / GIB,
        "table": report.table(),
    }


def in_own_process(case: Case) -> dict[str, object]:
    """Run a case in a fresh process beside a ballast; a failure is a result too."""
    with Ballast(case.vram_gib) as ballast:
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--free", str(ballast.free_bytes)]
        env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    sys.stderr.write(done.stderr[-3000:])
    if done.returncode:
        return {**asdict(case), "error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def cases(fp8: str, vae: str, steps: int) -> list[Case]:
    return [
        Case("resident", fp8),
        Case("all streamed in 4", fp8, vram_gib=4, blocks_to_swap=60),
        Case("all streamed in 3", fp8, vram_gib=3, blocks_to_swap=60),
        Case("planned in 6", fp8, vram_gib=6),
        Case("fp8_fast streamed in 4", fp8, vram_gib=4, blocks_to_swap=60, quantization="fp8_fast"),
        Case("5 s of video in 4", fp8, vram_gib=4, blocks_to_swap=60, seconds=5, steps=steps, vae=vae),
        Case("5 s of video in 3", fp8, vram_gib=3, blocks_to_swap=60, seconds=5, steps=steps, vae=vae),
        Case("5 s, TeaCache", fp8, vram_gib=4, blocks_to_swap=60, seconds=5, steps=steps, vae=vae, cache=0.15),
    ]


def table(results: list[dict[str, object]]) -> str:
    first = next((r for r in results if not r["vram_gib"] and "step" in r), None)
    resident = None if first is None else first["step"]
    floor = limit = 0.0
    if first is not None:
        limit = min(first["limit_seconds"])
        products, attention = first["sustained_tflops"]
        floor = first["products_tflop"] / products + first["attention_tflop"] / attention
    lines = [
        f"{'case':<24}{'s/step':>8}{'ratio':>7}{'x floor':>8}{'x limit':>8}"
        f"{'VRAM':>7}{'pred':>7}{'RSS':>7}{'file':>7}{'bytes':>8}"
    ]
    for r in results:
        if "error" in r:
            lines.append(f"{r['name']:<24} FAILED {r['error']}")
        elif "step" in r:
            lines.append(
                f"{r['name']:<24}{r['step']:>8.3f}{r['step'] / resident if resident else 0:>7.3f}"
                f"{r['step'] / floor if floor else 0:>8.3f}{r['step'] / limit if limit else 0:>8.3f}"
                f"{r['vram_gib_used']:>7.2f}{r['predicted_gib']:>7.2f}"
                f"{r['rss_gib']:>7.2f}{r['file_gib']:>7.2f}{r['streamed_bytes'] / r['block_bytes']:>7.0%}"
            )
        else:
            lines.append(
                f"{r['name']:<24}{r['total_seconds']:>8.1f} s in all  VRAM {r['vram_gib_used']:.2f} "
                f"RSS {r['rss_gib']:.2f} file {r['file_gib']:.2f}  {r['sections']}\n{r['table']}"
            )
    if first is not None:
        kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in first["kernels"]["kinds"].items())
        lines.append(f"ms of a resident step: {kinds}")
        rates = f"products at {products:.0f}, attention at {attention:.0f} TFLOP/s"
        lines.append(f"limit {limit:.3f} s; floor {floor:.3f} s: {rates}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp8", nargs="?", help="FramePack fp8 file (see synthetic.py)")
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--steps", type=int, default=25, help="of the videos")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--free", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = Case(**json.loads(options.case))
        print(json.dumps((run_video if case.seconds else run_steps)(case, options.free)))
        return
    vae = Path(options.fp8).with_name("hunyuan_vae_random.safetensors")
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            name: (torch.randn(tensor.shape, generator=generator) * 0.02).bfloat16()
            for name, tensor in HunyuanVAE(device="meta").state_dict().items()
        },
        vae,
    )
    words = (options.only or "").split(",")
    chosen = (case for case in cases(options.fp8, str(vae), options.steps) if any(word in case.name for word in words))
    results, path = run_cases("framepack", chosen, in_own_process)
    print(f"results in {path}")
    print(table(results))


if __name__ == "__main__":
    main()
