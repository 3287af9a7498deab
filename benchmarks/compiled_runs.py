"""torch.compile together with streaming, formats of weights and LoRAs; what makes code anew; the start with kept code.

python benchmarks/compiled_runs.py /tmp --part table     # x streaming x fp8, GGUF, LoRA, fused kernels or not
python benchmarks/compiled_runs.py /tmp --part once      # graphs, breaks and recompiles over all that varies in runs
python benchmarks/compiled_runs.py /tmp --part restart   # a second process with the code that the first one kept
python benchmarks/compiled_runs.py /tmp --part profiles  # high, mid and low one after the other, all blocks streamed
python benchmarks/compiled_runs.py /tmp --part table --only Q4_K lora   # these rows alone
python benchmarks/compiled_runs.py /tmp --part table --cpu   # tiny sizes, to see that it works

Files of random weights of Wan 14B, of as many blocks as `--blocks`, are made in the folder where they are missing; code
does not depend on how many there are. Every case is a process of its own, with time limits of its own; those of a table
compile at the same time, then each measures while the others wait. What ran out of time is told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lowvram_video.compilation.counts import counts
from lowvram_video.compilation.profiles import HIGH, LOW, MID, VideoMemory, settings_of
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.fused.eager import EagerOps
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import machine
from wan_bench import LORA, WEIGHTS, Bench, error_of
from workers import Worker, wait_for_turn

TABLE_WEIGHTS = (("fp8", "no"), ("Q4_K", "no"), ("fp8", "lora"), ("Q4_K", "lora"))
# width, height, frames
TABLE_SIZE, ONCE_SIZES, RESTART_SIZE = (832, 480, 33), ((832, 480, 17), (832, 480, 21)), (832, 480, 81)
REPEATS, STRENGTHS, PROMPTS, STEPS = 3, (1.0, 0.5, 0.0), 2, 20
CASES = {
    "table": [["table", *weights, ops] for weights in TABLE_WEIGHTS for ops in ("fused", "plain")],
    "profiles": [["profiles", profile] for profile in ("plain", HIGH, MID, LOW)],
    "once": [["once"]],
    "restart": [["restart"]],
}


# --- the table ---------------------------------------------------------------------------------------------


def table_case(bench: Bench, weights: str, lora: bool, fused: bool) -> list[dict[str, Any]]:
    """Compile, wait for a line on stdin, measure: plain and compiled, resident and streamed."""
    size = bench.size(TABLE_SIZE)
    compiled = bench.open(weights, lora, CompileSettings(backend=backend(bench)))
    take_ops(compiled, fused)
    bench.start(compiled, size, streamed=False, fused=fused)
    _, first = bench.run(compiled, size)
    compiled.stop()
    wait_for_turn()
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
    wait_for_turn()
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


# --- processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cases:
    """Of a bench: each is a process, which has `seconds` to be ready, and as many to measure. `log` is a folder."""

    bench: Bench
    seconds: float
    log: Path

    def worker(self, case: Sequence[str], environment: Mapping[str, str]) -> Worker:
        arguments = [__file__, str(self.bench.folder), "--blocks", str(self.bench.blocks), "--case", *case]
        on_cpu = [] if self.bench.on_gpu else ["--cpu"]
        name = " ".join(case)
        return Worker(name, [*arguments, *on_cpu], self.log / f"{name}.log", environment)

    def together(self, cases: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """All compile at once, then each measures while the others wait."""
        began = time.monotonic()
        workers = [self.worker(case, self.apart(f"{index}")) for index, case in enumerate(cases)]
        for worker in workers:
            worker.wait_until_ready(self.seconds)
        print(f"all compiled or ended by {time.monotonic() - began:.0f} s", file=sys.stderr)
        for worker in workers:
            yield from self.of(worker)

    def in_turn(self, cases: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Each compiles and measures while no other runs."""
        for index, case in enumerate(cases):
            worker = self.worker(case, self.apart(f"{index}"))
            worker.wait_until_ready(self.seconds)
            yield from self.of(worker)

    def once(self) -> Iterator[dict[str, Any]]:
        yield from self.of(self.worker(["once"], {"LOWVRAM_VIDEO_DATA": str(self.bench.folder / "no-data")}))

    def restart(self) -> Iterator[dict[str, Any]]:
        """Two processes that share nothing but the kept code."""
        for index, start in enumerate(("first", "after a restart")):
            own = {**self.apart(f"{index}"), "LOWVRAM_VIDEO_DATA": f"{self.log}/data"}
            for result in self.of(self.worker(["restart"], {**own, "TRITON_CACHE_DIR": f"{self.log}/{index}/triton"})):
                yield {"start": start, **result}

    def apart(self, name: str) -> dict[str, str]:
        """Caches of a process's own: nothing is compiled yet."""
        return {
            "TORCHINDUCTOR_CACHE_DIR": f"{self.log}/{name}/inductor",
            "LOWVRAM_VIDEO_DATA": f"{self.log}/{name}/data",
        }

    def of(self, worker: Worker) -> Iterator[dict[str, Any]]:
        """What a process found; why not, where it found nothing."""
        yield from worker.results(self.seconds)
        if worker.failed:
            print(f"{worker.name}: {worker.failed}", file=sys.stderr)
            yield {"case": worker.name, "failed": worker.failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where files of weights are made, several GB")
    parser.add_argument("--part", choices=["table", "once", "restart", "profiles"], default="table")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="cases with all of these words: Q4_K lora"
    )
    parser.add_argument("--blocks", type=int, default=6, help="of 40")
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=140, help="until a process is ready, and to measure")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options.folder, options.blocks, not options.cpu)
    if options.case:
        run_case(bench, options.case)
        return
    began = time.monotonic()
    chosen = [case for case in CASES[options.part] if set(options.only) <= set(case)]
    if not chosen:
        parser.error(f"no case of {options.part} has all of the words {options.only}")
    bench.write_files(files_of(chosen))
    found: dict[str, Any] = {"machine": machine(), "part": options.part, "blocks": bench.blocks, "results": []}
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        cases = Cases(bench, options.seconds, Path(folder))
        ways = {"once": cases.once, "restart": cases.restart, "profiles": partial(cases.in_turn, chosen)}
        for result in ways.get(options.part, partial(cases.together, chosen))():
            found["results"].append(result)
            if options.out is not None:
                write_file(options.out, json.dumps(found, indent=1).encode())
    print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)
    shown = [each for each in found["results"] if "failed" not in each] if options.part == "table" else []
    print(show_table(shown) if shown else "\n".join(json.dumps(each) for each in found["results"]))


def files_of(cases: Sequence[Sequence[str]]) -> set[str]:
    """Names of the files that these cases open."""
    words = {word for case in cases for word in case}
    files = {name for weights, name in WEIGHTS.items() if weights in words} or {WEIGHTS["fp8"]}
    return files | ({LORA} if words & {"lora", "once"} else set())


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
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
