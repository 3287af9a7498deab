"""Whole runs of 30 steps with a step cache and without, by the pipeline that makes videos: time, VRAM, skipped steps.

python benchmarks/step_cache_runs.py /tmp/w --out runs.json                              # uncached and all caches
python benchmarks/step_cache_runs.py /tmp/w --out runs.json --part uncached teacache     # these; goes on with --out
python benchmarks/step_cache_runs.py /tmp/w --cpu                                        # the demo model: does it work

A file of random weights of Wan 14B in fp8, all 40 blocks, a text encoder of two layers and a VAE are made in the folder
where they are missing (16 GB). All blocks stream. Each part is a process of its own with a time limit, written to --out
when it is done; parts that are there are not made again, unless they failed.

Random weights have no video whose change from step to step tells what to skip. MagCache decides by its published table
and the place in the schedule alone: that part decides by itself, as with the real file. The others look at what the
model computes, make the same comparisons and read them back, but are told to skip the steps that MagCache skips.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import allocator  # noqa: F401  first: torch reads what it sets
import torch
from end_to_end import save_text_encoder, save_vae
from lowvram_video.demo.files import DEMO_FILES
from lowvram_video.memory.plan.footprint import GIB
from lowvram_video.memory.report.report import RunReport
from lowvram_video.runtime.progress import Progress
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.sampling.caching.moments import Moment, moment_of
from lowvram_video.sampling.caching.pass_cache import PassCache
from lowvram_video.sampling.caching.settings import FIRST_BLOCK, MAGCACHE, TEACACHE, StepCacheSettings
from lowvram_video.sampling.caching.step_cache import Prompts, StepCache
from lowvram_video.sampling.caching.tables import published_tables
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from measure import bench_device
from surviving import CHILD, Rows, is_child, make_all
from synthetic import CONFIGS
from wan_bench import WEIGHTS

TABLE = "wan2.1_t2v_14B"
SHIFT = 5.0  # Wan's own of 14B
SIZE, DEMO_SIZE = (832, 480, 81), (96, 96, 17)  # width, height, frames
PASSES = 2  # of a step, where there is guidance
TOLD, ITSELF = "told: the steps that magcache's table skips", "itself: its table and the place alone"


@dataclass(frozen=True)
class Part:
    """One run; no `method`: as without a cache. `residuals` is where what the blocks added is kept."""

    method: str | None
    residuals: str = "auto"

    @property
    def settings(self) -> StepCacheSettings | None:
        if self.method is None:
            return None
        return StepCacheSettings(self.method, table=TABLE, residuals=self.residuals)


PARTS = {
    "uncached": Part(None),
    "teacache": Part(TEACACHE),
    "magcache": Part(MAGCACHE),
    "first_block": Part(FIRST_BLOCK),
    "teacache_ram": Part(TEACACHE, "ram"),
}


@dataclass
class ToldCache(StepCache):
    """A step cache that skips these steps, whatever it estimates; it still makes and reads back its estimates."""

    skips: frozenset[int] = frozenset()

    def at(self, moment: Moment) -> None:
        super().at(moment)
        self.repeat(torch.tensor([PASSES, *[moment.step in self.skips] * PASSES], dtype=torch.float32))


class Clock(Progress):
    """When the steps began, and when each was done: on the device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self._stepping = False

    def begin(self, title: str) -> None:
        self._stepping = title == "denoise"
        if self._stepping:
            self._mark()

    def update(self, done: int, total: int) -> None:
        if self._stepping:
            self._mark()

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def step_seconds(self) -> list[float]:
        """Of each step; waits for the last."""
        if self._on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        return [(one.elapsed_time(other) / 1000 if self._on_gpu else other - one) for one, other in pairs]


def skipped_by_table(levels: Sequence[float]) -> frozenset[int]:
    """The steps that MagCache's published table skips in a run over these noise levels."""
    settings = StepCacheSettings(MAGCACHE, table=TABLE)
    cache, prompts = StepCache(settings, published_tables()[TABLE]), ((0, 0),)
    for level in levels[:-1]:
        cache.at(moment_of(levels, level, SHIFT))
        _pass_of(cache, prompts)
    return frozenset(step for step, _, skips in cache.reading().passes if skips)


def _pass_of(cache: StepCache, prompts: Prompts) -> None:
    """A pass of no model."""
    each: PassCache | None = cache.of(prompts)
    assert each is not None
    if not each.reuse(torch.zeros(1, 1)):
        each.residual = torch.zeros(1, 1)
    cache.done(prompts, each)


def write_files(folder: Path) -> WanFiles:
    """Those that are missing; a whole file has its name."""
    makers = {
        # by the name that `compiled_runs.py` has for it
        f"wan14b_40_{WEIGHTS['fp8']}": write_model,
        "umt5_two_layers.safetensors": save_text_encoder,
        "wan_vae.safetensors": lambda path: save_vae(path, torch.bfloat16),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        if not (folder / name).exists():
            make(folder / f"partial_{name}")
            (folder / f"partial_{name}").replace(folder / name)
    return WanFiles(*(folder / name for name in makers))


def write_model(path: Path) -> None:
    """In a process of its own, which leaves nothing on the GPU."""
    script = Path(__file__).with_name("synthetic.py")
    subprocess.run([sys.executable, str(script), "14b", "fp8", str(path)], check=True)


def run_part(name: str, files: WanFiles, options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process, which nothing else has used the GPU of."""
    part, device = PARTS[name], torch.device("cpu") if options.cpu else bench_device()
    budget, swapped = (None, -1) if options.cpu else (options.vram, CONFIGS["14b"].num_layers)
    clock = Clock(device)
    settings = RunSettings(device, vram_budget_gib=budget, blocks_to_swap=swapped, step_cache=part.settings)
    pipeline = WanPipeline(files, settings, clock)
    blocks = len(pipeline.high.blocks)
    width, height, frames = DEMO_SIZE if options.cpu else SIZE
    request = WanRequest(
        "a cat surfs a wave", width=width, height=height, num_frames=frames, num_steps=options.steps,
        guidance=options.guidance, shift=SHIFT,
    )  # fmt: skip
    told = part.method in (TEACACHE, FIRST_BLOCK)
    cache = pipeline.high.step_cache
    if told:
        assert cache is not None
        skips = skipped_by_table(pipeline.sigmas(request.completed(pipeline.defaults)).tolist())
        cache = pipeline.high.step_cache = ToldCache(cache.settings, cache.table, skips=skips)
    began = time.perf_counter()
    pipeline.denoise(request)
    steps = clock.step_seconds()
    seconds = time.perf_counter() - began
    decided = None if part.method is None else TOLD if told else ITSELF
    return {
        "name": name, "decided_by": decided, "blocks": blocks, "size": [width, height, frames],
        "guidance": options.guidance, "vram_budget_gib": budget, "seconds": seconds, "steps_seconds": sum(steps),
        "step_seconds": steps, **memory_of(pipeline.report()),
    }  # fmt: skip


def memory_of(report: RunReport) -> dict[str, Any]:
    """Peaks of the steps, what streamed, and what the step cache tells."""
    phase = next(phase for phase in report.phases if phase.name == "denoise")
    found: dict[str, Any] = {
        "vram_peak_gib": report.vram_bytes(phase) / GIB,
        "reserved_peak_gib": phase.reserved_peak_bytes / GIB,
        "predicted_gib": None if phase.predicted_bytes is None else phase.predicted_bytes / GIB,
        "rss_peak_gib": phase.rss_peak_bytes / GIB,
        "pinned_gib": report.pinned_bytes / GIB,
    }
    if report.stream is not None:
        found["streamed_gb"] = report.stream.bytes_streamed / 1e9
        found["stall_ms_per_pass"] = report.stream.stall_ms_per_pass
    for reading in report.step_caches:
        found["cache"] = reading.label
        found["skipped_steps"] = [step + 1 for step, passes, skips in reading.passes if skips == passes]
        found["skipped_passes"] = sum(skips for _, _, skips in reading.passes)
        found["residual_gib"] = reading.residual_bytes / GIB
        found["residuals_in"] = "RAM" if reading.in_ram else "VRAM"
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'part':<14}{'steps s':>9}{'times':>7}{'first s':>9}{'in all s':>10}{'skipped':>9}{'VRAM GiB':>10}"
        f"{'added':>8}{'residuals':>17}"
    ]
    plain = next((row for row in rows if row["name"] == "uncached"), None)
    for row in rows:
        times = added = ""
        if plain is not None and all(row[same] == plain[same] for same in ("size", "guidance", "vram_budget_gib")):
            times = f"{plain['steps_seconds'] / row['steps_seconds']:.2f}"
            added = f"{row['reserved_peak_gib'] - plain['reserved_peak_gib']:.2f}"
        kept = f"{row['residual_gib']:.2f} in {row['residuals_in']}" if row["decided_by"] else ""
        lines.append(
            f"{row['name']:<14}{row['steps_seconds']:>9.1f}{times:>7}{row['step_seconds'][0]:>9.2f}"
            f"{row['seconds']:>10.1f}{len(row.get('skipped_steps', ())):>9}{row['reserved_peak_gib']:>10.2f}{added:>8}"
            f"{kept:>17}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where files of weights are made")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS)[:4])
    parser.add_argument("--out", type=Path, help="the JSON (left out: step_cache_runs.json in the folder)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0, help="1: one pass a step, for half the time")
    parser.add_argument("--vram", type=float, default=16.0, help="GiB, the budget")
    parser.add_argument("--limit", type=float, default=280.0, help="seconds that a part may take")
    parser.add_argument("--cpu", action="store_true", help="the demo model on the CPU")
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not is_child():
        if not options.cpu:
            write_files(options.folder)
        for part in options.part:  # a process for each
            make_all([part], options.out or options.folder / "step_cache_runs.json", table, go_on=True)
        return
    done, name = Rows(options.out), options.rows
    with done.watched(name, options.limit):
        done.add(run_part(name, DEMO_FILES if options.cpu else write_files(options.folder), options))


if __name__ == "__main__":
    main()
