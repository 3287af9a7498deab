"""Blocks compiled one by one against plain ones: time and memory of a pass, time to compile, how often, and the error.

python benchmarks/compiled.py             # in compiled code: our Triton kernels as operators, or PyTorch for inductor
python benchmarks/compiled.py --all       # and our kernels as Dynamo traces them, which may crash
python benchmarks/compiled.py --cpu       # tiny sizes, to see that it works

Every variant is a process of its own. All compile at the same time, then each measures while the others wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.compilation.blocks import compile_modules, dynamo_limits
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel, Frames, History, Prompt
from lowvram_video.fused.eager import EagerOps
from lowvram_video.fused.opaque import OpaqueOps
from lowvram_video.fused.ops import FusedOps
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.transformer import Transformer
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from measure import save_results
from torch import Tensor
from torch._dynamo.utils import counters
from workers import Worker, wait_for_turn

MIB = 2**20
VARIANTS = {
    "plain": "not compiled",
    "traced": "our kernels as Dynamo traces them",
    "opaque": "our kernels as operators",
    "inductor": "PyTorch's steps, fused by inductor",
}
TIMESTEPS, SEEDS = (900.0, 500.0, 20.0), (0, 1)
REPEATS = 5
SECONDS = 540  # what still runs then is stopped

Run = Callable[[float, int], Tensor]  # a timestep and a seed -> the model's velocity


@dataclass(frozen=True)
class Case:
    """A model and its input; Wan's is `[latent frames, h, w]`, FramePack's `[window, h, w]`."""

    name: str
    family: str
    size: tuple[int, int, int]
    token_chunk: int = 4096
    tiny: bool = False


CASES = (
    Case("Wan 14B, 480x832x17", "wan", (5, 60, 104)),
    Case("Wan 14B, 480x832x81", "wan", (21, 60, 104)),
    Case("FramePack, 608x640 section", "framepack", (9, 76, 80)),
)
TINY_CASES = (
    Case("tiny Wan", "wan", (2, 12, 16), token_chunk=40, tiny=True),
    Case("tiny FramePack", "framepack", (2, 12, 12), token_chunk=40, tiny=True),
)


@dataclass(frozen=True)
class Job:
    """What one process does; `folder` holds the velocities of the plain run."""

    variant: str
    backend: str
    on_gpu: bool
    folder: str

    @property
    def cases(self) -> tuple[Case, ...]:
        return CASES if self.on_gpu else TINY_CASES

    @property
    def settings(self) -> CompileSettings:
        return CompileSettings(backend=self.backend)


# --- in a variant's process ------------------------------------------------------------------------------


def run_job(job: Job) -> None:
    """Compile all cases, wait for a line on stdin, then measure; one line of JSON for each."""
    device, dtype = (torch.device("cuda", 0), torch.bfloat16) if job.on_gpu else (torch.device("cpu"), torch.float32)
    ready: list[tuple[Case, Run, dict[str, Any]]] = []
    with torch.inference_mode(), dynamo_limits(job.settings):
        for case in job.cases:
            model, run = build(case, job, device, dtype)
            ready.append((case, run, compile_case(model, run, job, device)))
        wait_for_turn()
        for number, (case, run, compiled) in enumerate(ready):
            result = {"case": case.name, "variant": job.variant, **compiled, **measure(run, device)}
            print(json.dumps({**result, **compare(case, number, run, job)}), flush=True)


def build(case: Case, job: Job, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Run]:
    """A model of a few blocks with random weights, and how it is run."""
    model, run = (build_wan if case.family == "wan" else build_framepack)(case, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 and "modulation" not in name else 0
        parameter.normal_(generator=generator).mul_(0.7 / fan_in**0.5 if fan_in else 0.05)
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            parameter.add_(1)
    model.execution = Execution(dtype, Sdpa(device), steps_of(job), case.token_chunk)
    return model.requires_grad_(False), run


def build_wan(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Run]:
    config = WanConfig("t2v", 5120, 13824, 40, 3)
    if case.tiny:
        config = WanConfig("t2v", 128, 192, 1, 3, text_dim=32, freq_dim=32)
    model = WanModel(config, device=device, dtype=dtype)

    def run(timestep: float, seed: int) -> Tensor:
        draw = drawing(device, seed)
        latent, text = draw(1, config.in_channels, *case.size), draw(1, config.text_tokens, config.text_dim)
        return model(latent, torch.tensor([timestep], device=device), text)

    return model, run


def build_framepack(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Run]:
    config = replace(FramePackConfig(), num_layers=2, num_single_layers=3)
    if case.tiny:
        small = {"num_heads": 2, "head_dim": 16, "text_dim": 24, "pooled_dim": 12, "image_dim": 20}
        config = replace(config, rope_axes=(4, 6, 6), **small)
    model = FramePackModel(config, device=device, dtype=dtype)

    def run(timestep: float, seed: int) -> Tensor:
        draw = drawing(device, seed)
        window, height, width = case.size

        def frames(first: int, count: int) -> Frames:
            indices = torch.arange(first, first + count, device=device)
            return Frames(draw(1, config.in_channels, count, height, width), indices)

        # a start image and the nearest latent in full, 2 at a half, 16 at a quarter, as in every section
        history = History(clean=frames(0, 2), twice=frames(window + 2, 2), four=frames(window + 4, 16))
        prompt = Prompt(draw(1, 256, config.text_dim), draw(1, config.pooled_dim))
        (condition,) = model.conditions(prompt, torch.tensor([timestep], device=device), 10000.0)
        return model(frames(1, window), history, condition, model.embed_image(draw(1, 729, config.image_dim)))

    return model, run


def drawing(device: torch.device, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, device=device, generator=generator)


def steps_of(job: Job) -> FusedOps:
    """The elementwise steps: the usual ones, and in compiled code the variant's."""
    if not job.on_gpu:
        return OpaqueOps() if job.variant == "opaque" else EagerOps()
    from lowvram_video.fused.triton_ops import TritonOps

    class Steps(TritonOps):
        def compiled(self) -> FusedOps:
            others: dict[str, FusedOps] = {"opaque": OpaqueOps(), "inductor": EagerOps()}
            return others.get(job.variant, self)

    return Steps()


def compile_case(model: Transformer, run: Run, job: Job, device: torch.device) -> dict[str, Any]:
    """Compile a model's blocks in a first pass; what comes after it should make no code anew."""
    blocks = list(model.ordered_blocks().values())
    if job.variant != "plain":
        compile_modules(blocks, job.settings)
    before = graphs_made()
    first = seconds_of(run, device)
    again = seconds_of(run, device)
    # the first pass makes the code of every kind of block
    return {
        "compile_seconds": 0.0 if job.variant == "plain" else first - again,
        "graphs": graphs_made() - before,
        "kinds": 0 if job.variant == "plain" else len({type(block) for block in blocks}),
    }


def graphs_made() -> int:
    return int(counters["stats"]["unique_graphs"])


def seconds_of(run: Run, device: torch.device, timestep: float = 700.0, seed: int = 7) -> float:
    synchronize(device)
    began = time.perf_counter()
    run(timestep, seed)
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Run, device: torch.device) -> dict[str, Any]:
    """Median seconds of a pass, and the most memory that it has beside what is there before."""
    seconds_of(run, device)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    seconds = [seconds_of(run, device) for _ in range(REPEATS)]
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "pass_mib": peak / MIB}


def compare(case: Case, number: int, run: Run, job: Job) -> dict[str, Any]:
    """Relative error against the plain run, over timesteps and seeds; the code that these made anew."""
    before, errors = graphs_made(), []
    for timestep in TIMESTEPS:
        for seed in SEEDS:
            path = Path(job.folder) / f"{number}_{timestep}_{seed}.pt"
            velocity = run(timestep, seed).float().cpu()
            if job.variant == "plain":
                torch.save(velocity, path)
            elif path.exists():
                want = torch.load(path)
                errors.append(float((velocity - want).norm() / want.norm()))
    return {"error": max(errors, default=None), "recompiled": graphs_made() - before}


# --- the table -------------------------------------------------------------------------------------------


def run_variants(variants: Sequence[str], backend: str, on_gpu: bool) -> list[dict[str, Any]]:
    """All compile at once; then one after the other measures. A crash is a result too."""
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(variant, backend, on_gpu, folder) for variant in variants]
        workers = [worker_of(job) for job in jobs]
        for worker in workers:
            worker.wait_until_ready(SECONDS)
            print(f"{worker.name}: compiled or failed by {time.monotonic() - began:.0f} s", file=sys.stderr)
        for job, worker in zip(jobs, workers, strict=True):
            done = worker.results(max(1.0, began + SECONDS - time.monotonic()))
            reached = {line["case"] for line in done}
            missing = [case.name for case in job.cases if case.name not in reached]
            results += done + [{"case": name, "variant": job.variant, "failed": worker.failed} for name in missing]
    print(f"all measured by {time.monotonic() - began:.0f} s", file=sys.stderr)
    return results


def worker_of(job: Job) -> Worker:
    folder = Path(job.folder)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache_{job.variant}")}  # nothing is compiled yet
    return Worker(job.variant, [__file__, "--job", json.dumps(asdict(job))], folder / f"{job.variant}.log", cache)


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'case':<28}{'variant':<10}{'s/pass':>9}{'ratio':>7}{'pass MiB':>10}{'compile s':>11}{'graphs':>8}"
        f"{'again':>7}{'error':>10}"
    ]
    plain = {r["case"]: r["seconds"] for r in results if r["variant"] == "plain" and "seconds" in r}
    for r in sorted(results, key=lambda r: str(r["case"])):
        if "failed" in r:
            lines.append(f"{r['case']:<28}{r['variant']:<10} FAILED {r['failed']}")
            continue
        ratio = r["seconds"] / plain.get(r["case"], r["seconds"])
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        lines.append(
            f"{r['case']:<28}{r['variant']:<10}{r['seconds']:>9.4f}{ratio:>7.3f}{r['pass_mib']:>10.0f}"
            f"{r['compile_seconds']:>11.1f}{r['graphs']:>4} of {r['kinds']}{r['recompiled']:>7}{error:>10}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="our kernels as Dynamo traces them, too; this may crash")
    parser.add_argument("--only", help="one variant beside plain: " + ", ".join(VARIANTS))
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--backend", help="inductor; on the CPU aot_eager, which takes no C++ compiler")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        run_job(Job(**json.loads(options.job)))
        return
    if not options.cpu and not torch.cuda.is_available():
        sys.exit("compiled.py measures on an NVIDIA GPU and found none here; --cpu runs it with tiny sizes")
    chosen = ["plain", "opaque", "inductor"] if options.only is None else ["plain", options.only]
    if options.all and not options.cpu:
        chosen.append("traced")
    backend = options.backend or ("aot_eager" if options.cpu else "inductor")
    results = run_variants(chosen, backend, not options.cpu)
    path = save_results("compiled", {"backend": backend, "variants": VARIANTS, "cases": results})
    print(f"results in {path}")
    print(table(results))


if __name__ == "__main__":
    main()
