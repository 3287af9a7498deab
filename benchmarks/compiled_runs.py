"""torch.compile together with streaming, formats of weights and LoRAs; what makes code anew; the start with kept code.

python benchmarks/compiled_runs.py /tmp --part table     # x streaming x fp8, GGUF, LoRA, fused kernels or not
python benchmarks/compiled_runs.py /tmp --part once      # graphs, breaks and recompiles over all that varies in runs
python benchmarks/compiled_runs.py /tmp --part restart   # a second process with the code that the first one kept
python benchmarks/compiled_runs.py /tmp --part profiles  # high, mid and low, all blocks streamed
python benchmarks/compiled_runs.py /tmp --part table --cpu   # tiny sizes, to see that it works

Files of random weights of Wan 14B, of as many blocks as `--blocks`, are made in the folder where they are missing; code
does not depend on how many there are. Every case is a process of its own: all compile at the same time, then each
measures while the others wait.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lowvram_video.compilation.counts import counts
from lowvram_video.compilation.profiles import HIGH, LOW, MID, VideoMemory, settings_of
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.fused.eager import EagerOps
from lowvram_video.memory.plan.limits import Limits, limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.lora.file import LoraChoice
from measure import machine
from synthetic import CONFIGS, write_checkpoint, write_gguf, write_lora
from torch import Tensor

GIB = 2**30
VRAM_GIB = 16  # of plans
WEIGHTS = {"fp8": "fp8.safetensors", "Q4_K": "q4_k.gguf"}
TABLE_WEIGHTS = (("fp8", "no"), ("Q4_K", "no"), ("fp8", "lora"))
TINY = WanConfig("t2v", 256, 512, 2, 3, text_dim=32, freq_dim=32)
# width, height, frames
TABLE_SIZE, ONCE_SIZES, RESTART_SIZE = (832, 480, 33), ((832, 480, 17), (832, 480, 21)), (832, 480, 81)
TINY_SIZES = ((128, 96, 5), (128, 112, 5))
REPEATS, STRENGTHS, PROMPTS, STEPS = 3, (1.0, 0.5, 0.0), 2, 20
CASES = {
    "table": [["table", *weights, ops] for weights in TABLE_WEIGHTS for ops in ("fused", "plain")],
    "profiles": [["profiles", profile] for profile in ("plain", HIGH, MID, LOW)],
}
FILES = {"table": (*WEIGHTS.values(), "lora32.safetensors"), "once": (WEIGHTS["fp8"], "lora32.safetensors")}


@dataclass(frozen=True)
class Bench:
    """Where files are, and of what."""

    folder: Path
    blocks: int
    on_gpu: bool
    seconds: float  # that a process may take; then it is ended

    @property
    def config(self) -> WanConfig:
        config = CONFIGS["14b"] if self.on_gpu else TINY
        assert isinstance(config, WanConfig)
        return replace(config, num_layers=self.blocks)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    def size(self, on_gpu: tuple[int, int, int], tiny: int = 0) -> tuple[int, int, int]:
        return on_gpu if self.on_gpu else TINY_SIZES[tiny]

    def path(self, name: str) -> Path:
        return self.folder / f"{'wan14b' if self.on_gpu else 'tiny'}_{self.blocks}_{name}"

    def write_files(self, names: Sequence[str]) -> None:
        """Those of `names` that are missing; a whole file has its name."""
        makers = {
            WEIGHTS["fp8"]: lambda path: write_checkpoint(path, self.config, "fp8", str(self.device)),
            WEIGHTS["Q4_K"]: lambda path: write_gguf(path, self.config, "Q4_K", str(self.device)),
            "lora32.safetensors": lambda path: write_lora(path, self.config, 32),
        }
        for name in names:
            path = self.path(name)
            if not path.exists():
                partial = path.with_name(f"partial_{path.name}")
                makers[name](partial)
                partial.replace(path)

    def open(self, weights: str, lora: bool, settings: CompileSettings | None) -> StreamedWan:
        loras = [LoraChoice(self.path("lora32.safetensors"))] if lora else []
        model = StreamedWan(self.path(WEIGHTS[weights]), RunSettings(self.device, lora_mode="side"), loras=loras)
        model.compile(settings)
        return model

    def start(self, model: StreamedWan, size: tuple[int, int, int], streamed: bool, fused: bool = True) -> None:
        swap = self.blocks if streamed else 0
        limits = replace(card_limits(self.device), blocks_to_swap=swap, fused=fused and self.on_gpu)
        model.stop()
        self.free()
        model.start(model.make_plan(wan_work(self.config, size), limits))

    def run(
        self, model: StreamedWan, size: tuple[int, int, int], step: int = 0, prompt: int = 0
    ) -> tuple[Tensor, float]:
        """A pass's velocity, and its seconds."""
        width, height, frames = size
        latent = draw(self.device, step, 1, 16, (frames + 3) // 4, height // 8, width // 8)
        text = draw(self.device, 100 + prompt, 1, self.config.text_tokens, self.config.text_dim)
        self.wait()
        began = time.perf_counter()
        velocity = model(latent, torch.tensor([1000.0 - 45 * step], device=self.device), text)
        self.wait()
        return velocity, time.perf_counter() - began

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """Of the allocator, since the start."""
        return torch.cuda.max_memory_reserved(self.device) / GIB if self.on_gpu else 0.0


@cache
def card_limits(device: torch.device) -> Limits:
    """Of a card with all the VRAM that is wanted, its link timed once."""
    return limits_for(device, vram_budget_gib=VRAM_GIB)


def draw(device: torch.device, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def error_of(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


# --- the table ---------------------------------------------------------------------------------------------


def table_case(bench: Bench, weights: str, lora: bool, fused: bool) -> list[dict[str, Any]]:
    """Compile, wait for a line on stdin, measure: plain and compiled, resident and streamed."""
    size = bench.size(TABLE_SIZE)
    compiled = bench.open(weights, lora, CompileSettings(backend=backend(bench)))
    take_ops(compiled, fused)
    bench.start(compiled, size, streamed=False, fused=fused)
    _, first = bench.run(compiled, size)
    compiled.stop()
    ready()
    results, wanted = [], {}
    plain = bench.open(weights, lora, None)
    take_ops(plain, fused)
    for name, model in (("plain", plain), ("compiled", compiled)):
        for streamed in (False, True):
            bench.start(model, size, streamed, fused)
            velocity, _ = bench.run(model, size)
            seconds = [bench.run(model, size)[1] for _ in range(REPEATS)]
            wanted.setdefault(streamed, velocity)
            results.append(
                {"weights": weights, "lora": lora, "fused": fused, "way": name, "streamed": streamed,
                 "seconds": statistics.median(seconds), "peak_gib": bench.peak_gib(),
                 "compile_seconds": first if model is compiled else 0.0,
                 "error": error_of(velocity, wanted[streamed])}
            )  # fmt: skip
            model.stop()
    return results


def take_ops(model: StreamedWan, fused: bool) -> None:
    """Elementwise steps without our kernels: PyTorch's, which inductor fuses where it compiles."""
    if not fused:
        model.model.execution = replace(model.model.execution, ops=EagerOps())


def ready() -> None:
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()


def backend(bench: Bench) -> str:
    return "inductor" if bench.on_gpu else "aot_eager"


def show_table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'weights':<14}{'kernels':<9}{'blocks':<10}{'way':<10}{'s/pass':>9}{'ratio':>7}{'VRAM GiB':>10}"
        f"{'compile s':>11}{'error':>10}"
    ]
    plain = {key(r): r["seconds"] for r in results if r["way"] == "plain"}
    for r in results:
        name = f"{r['weights']}{' + LoRA' if r['lora'] else ''}"
        lines.append(
            f"{name:<14}{'fused' if r['fused'] else 'PyTorch':<9}{'streamed' if r['streamed'] else 'resident':<10}"
            f"{r['way']:<10}{r['seconds']:>9.4f}{r['seconds'] / plain[key(r)]:>7.3f}{r['peak_gib']:>10.2f}"
            f"{r['compile_seconds']:>11.1f}{r['error']:>10.1e}"
        )
    return "\n".join(lines)


def key(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["weights"], result["lora"], result["fused"], result["streamed"]


# --- profiles ----------------------------------------------------------------------------------------------


def profile_case(bench: Bench, profile: str) -> list[dict[str, Any]]:
    """As `table_case`, of fp8 weights that stream, by the settings of one profile; `plain` is without torch.compile."""
    size = bench.size(TABLE_SIZE)
    own = CompileSettings(backend=backend(bench))
    settings = None if profile == "plain" else settings_of(profile, own, VideoMemory(0, 0))
    model = bench.open("fp8", False, settings)
    bench.start(model, size, streamed=True)
    _, first = bench.run(model, size)
    ready()
    seconds = [bench.run(model, size)[1] for _ in range(REPEATS)]
    return [
        {"profile": profile, "settings": str(settings or "not compiled"), "first_pass_seconds": first,
         "seconds": statistics.median(seconds), "peak_gib": bench.peak_gib()}
    ]  # fmt: skip


# --- what makes code anew ----------------------------------------------------------------------------------


def once_case(bench: Bench) -> list[dict[str, Any]]:
    """Two experts, two sizes, LoRA strengths, prompts and steps with one code for any size."""
    settings = CompileSettings(backend=backend(bench), fullgraph=True, dynamic=True)
    before, passes, errors, first = counts(), 0, [], 0.0
    experts = [bench.open("fp8", True, settings) for _ in range(2)]
    plain = bench.open("fp8", True, None)
    for index, on_gpu in enumerate(ONCE_SIZES):
        size = bench.size(on_gpu, index)
        for model in (*experts, plain):
            bench.start(model, size, streamed=True)
        for strength in STRENGTHS:
            for model in (*experts, plain):
                model.set_lora_strengths([strength])
            for prompt in range(PROMPTS):
                for step in range(STEPS):
                    got, seconds = bench.run(experts[step >= STEPS // 2], size, step, prompt)
                    first = first or seconds
                    passes += 1
                    if step in (0, STEPS - 1):
                        errors.append(error_of(got, bench.run(plain, size, step, prompt)[0]))
    made = counts() - before
    again = [reason for model in experts for reason in model.compiled.reading().again]  # type: ignore[union-attr]
    return [
        {"passes": passes, "graphs": made.graphs, "breaks": made.breaks, "recompiles": len(again), "reasons": again,
         "largest_error": max(errors), "first_pass_seconds": first}
    ]  # fmt: skip


# --- the start with kept code ------------------------------------------------------------------------------


def restart_case(bench: Bench) -> list[dict[str, Any]]:
    """The first pass of a process, with whatever code is kept."""
    size = bench.size(RESTART_SIZE)
    model = bench.open("fp8", False, CompileSettings(backend=backend(bench)))
    bench.start(model, size, streamed=True)
    _, first = bench.run(model, size)
    seconds = [bench.run(model, size)[1] for _ in range(REPEATS)]
    assert model.compiled is not None
    reading = model.compiled.reading()
    usual = statistics.median(seconds)
    rest = usual * (40 / bench.blocks - 1) if bench.on_gpu else 0.0
    return [
        {"first_pass_seconds": first, "pass_seconds": usual, "first_pass_of_40_blocks": first + rest,
         "compile_seconds": reading.seconds, "hits": reading.counts.hits, "misses": reading.counts.misses,
         "bypasses": reading.counts.bypasses, "saved_bytes": reading.saved_bytes}
    ]  # fmt: skip


def run_restart(bench: Bench) -> list[dict[str, Any]]:
    """Two processes that share nothing but the kept code."""
    results = []
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        for start in ("first", "after a restart"):
            place = f"{folder}/{len(results)}"
            own = {"TORCHINDUCTOR_CACHE_DIR": f"{place}/inductor", "TRITON_CACHE_DIR": f"{place}/triton"}
            worker = Worker(bench, ["restart"], {"LOWVRAM_VIDEO_DATA": f"{folder}/data", **own})
            results += [{"start": start, **each} for each in worker.results()]
    return results


# --- processes -------------------------------------------------------------------------------------------


class Worker:
    """A process that does one case."""

    def __init__(self, bench: Bench, case: Sequence[str], environment: dict[str, str]):
        self.case = " ".join(case)
        arguments = [
            str(bench.folder),
            "--blocks",
            str(bench.blocks),
            "--seconds",
            str(bench.seconds),
            "--case",
            *case,
            *([] if bench.on_gpu else ["--cpu"]),
        ]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.limit = threading.Timer(bench.seconds, self.process.kill)
        self.limit.daemon = True
        self.limit.start()

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"ready"'):
                return

    def results(self) -> list[dict[str, Any]]:
        """Let it measure; what it found, nothing where it failed or was late."""
        try:
            said, _ = self.process.communicate("go\n")
        except BrokenPipeError:
            said, _ = self.process.communicate()
        self.limit.cancel()
        found = [json.loads(line) for line in said.splitlines() if line.startswith('{"result"')]
        if not found:
            print(f"{self.case}: no result, exit code {self.process.returncode}", file=sys.stderr)
        return [each["result"] for each in found]


def apart(folder: str) -> dict[str, str]:
    """Caches of a process's own: nothing is compiled yet."""
    return {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "LOWVRAM_VIDEO_DATA": f"{folder}/data"}


def run_together(bench: Bench, cases: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """All compile at once, then each measures while the others wait."""
    began = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        workers = [Worker(bench, case, apart(f"{folder}/{index}")) for index, case in enumerate(cases)]
        for worker in workers:
            worker.wait_until_ready()
        print(f"all compiled by {time.monotonic() - began:.0f} s", file=sys.stderr)
        for worker in workers:
            results += worker.results()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where files of weights are made, several GB")
    parser.add_argument("--part", choices=["table", "once", "restart", "profiles"], default="table")
    parser.add_argument("--blocks", type=int, default=6, help="of 40")
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=140, help="that a process may take")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options.folder, options.blocks, not options.cpu, options.seconds)
    if options.case:
        run_case(bench, options.case)
        return
    began = time.monotonic()
    bench.write_files(FILES.get(options.part, (WEIGHTS["fp8"],)))
    if options.part == "once":
        results = Worker(bench, ["once"], {"LOWVRAM_VIDEO_DATA": str(options.folder / "no-data")}).results()
    else:
        results = run_restart(bench) if options.part == "restart" else run_together(bench, CASES[options.part])
    found = {"machine": machine(), "part": options.part, "blocks": bench.blocks, "results": results}
    if options.out is not None:
        write_file(options.out, json.dumps(found, indent=1).encode())
    print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)
    print(show_table(results) if options.part == "table" else "\n".join(json.dumps(each) for each in results))


def run_case(bench: Bench, case: Sequence[str]) -> None:
    """One case in its own process."""
    with torch.inference_mode():
        if case[0] == "table":
            results = table_case(bench, case[1], case[2] == "lora", case[3] == "fused")
        elif case[0] == "profiles":
            results = profile_case(bench, case[1])
        else:
            results = once_case(bench) if case[0] == "once" else restart_case(bench)
    for result in results:
        print(json.dumps({"result": result}), flush=True)


if __name__ == "__main__":
    main()
