"""What step caches do to the demo model, calibrated for itself: speed-up, PSNR and demo score per threshold.

python benchmarks/step_cache.py --num 24

Seconds are of the process's own CPU time in denoising, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lowvram_video.benchmarks.demo.score import judge, pick_captions
from lowvram_video.demo.files import DEMO_FILES, make_clip
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.sampling.caching.settings import FIRST_BLOCK, MAGCACHE, TEACACHE, StepCacheSettings
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.step_tables import own_table
from measure import psnr, save_results
from torch import Tensor

THRESHOLDS = {
    TEACACHE: (0.15, 0.25, 0.1, 0.4),
    MAGCACHE: (0.13, 0.25, 0.08, 0.4),
    FIRST_BLOCK: (0.15, 0.25, 0.1, 0.2),
}
FIRST_SEED = 1000


@dataclass(frozen=True)
class Result:
    """One cache at one threshold, over all clips. `seconds` of denoising a clip, the median; `skipped` share of steps;
    `psnr` against the uncached clips of the same seeds, in dB, the mean; `right` clips of `num`."""

    method: str
    threshold: float
    seconds: float
    speed_up: float
    skipped: float
    psnr: float
    worst_psnr: float
    right: int
    num: int


class Timed(WanPipeline):
    """Remembers the CPU time of denoising."""

    seconds: list[float]

    def _denoise(self, *arguments: Any) -> Tensor:
        began = time.process_time()
        latent = super()._denoise(*arguments)
        self.seconds.append(time.process_time() - began)
        return latent


def clips_of(cache: StepCacheSettings | None, captions: Sequence[Any]) -> tuple[Tensor, Timed, float]:
    """A clip per caption `[N, T, H, W, 3]` uint8, what made them, and the share of steps that was skipped."""
    pipeline = Timed(DEMO_FILES, RunSettings(keep_loaded=True, step_cache=cache))
    pipeline.seconds = []
    clips, steps, skipped = [], 0, 0.0
    for index, caption in enumerate(captions):
        clips.append(make_clip(pipeline, caption.text, FIRST_SEED + index))
        for reading in pipeline.report().step_caches:
            steps += len(reading.passes)
            skipped += sum(skips / passes for _, passes, skips in reading.passes)
    return torch.stack(clips), pipeline, skipped / max(1, steps)


def measure(cache: StepCacheSettings | None, captions: Sequence[Any], exact: Tensor | None, whole: float) -> Result:
    """`whole` seconds a clip takes that is not cached."""
    clips, pipeline, skipped = clips_of(cache, captions)
    verdicts = [judge(clip.float() / 255, caption) for clip, caption in zip(clips, captions, strict=True)]
    found = [math.inf] if exact is None else [psnr(one, other) for one, other in zip(clips, exact, strict=True)]
    seconds = statistics.median(pipeline.seconds)
    return Result(
        "none" if cache is None else cache.method,
        0.0 if cache is None or cache.threshold is None else cache.threshold,
        seconds,
        (whole or seconds) / seconds,
        skipped,
        statistics.mean(found),
        min(found),
        sum(verdict.all_right for verdict in verdicts),
        len(captions),
    )


def line(result: Result) -> str:
    return (
        f"{result.method:<12}{result.threshold:>9.3g}{result.seconds:>9.2f} s{result.speed_up:>8.2f}x"
        f"{100 * result.skipped:>8.0f} %{result.psnr:>8.1f}{result.worst_psnr:>8.1f} dB"
        f"{result.right:>6} of {result.num} = {100 * result.right / result.num:.0f} %"
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Speed-up against PSNR, with the score beside each point."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for method in THRESHOLDS:
        rows = sorted((result for result in results if result.method == method), key=lambda row: row.threshold)
        axes.plot([row.speed_up for row in rows], [row.psnr for row in rows], marker="o", label=method)
        for row in rows:
            text = f"{row.threshold:g}: {100 * row.right / row.num:.0f} %"
            axes.annotate(text, (row.speed_up, row.psnr), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.axvline(1.5, color="grey", linestyle=":")
    axes.set(xlabel="speed-up of denoising", ylabel="PSNR against uncached (dB)", title="demo model, 20 steps, CPU")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=24, help="clips per threshold")
    parser.add_argument("--thresholds", type=int, default=4, help="so many of each cache's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    captions = pick_captions(options.num)
    exact, pipeline, _ = clips_of(None, captions)
    whole = statistics.median(pipeline.seconds)
    verdicts = [judge(clip.float() / 255, caption) for clip, caption in zip(exact, captions, strict=True)]
    results = [Result("none", 0.0, whole, 1.0, 0.0, math.inf, math.inf, sum(v.all_right for v in verdicts), len(exact))]
    print(line(results[0]), flush=True)
    for method, thresholds in THRESHOLDS.items():
        for threshold in thresholds[: options.thresholds]:
            results.append(measure(StepCacheSettings(method, threshold), captions, exact, whole))
            print(line(results[-1]), flush=True)
    rows = [
        asdict(replace(each, psnr=min(each.psnr, 999.0), worst_psnr=min(each.worst_psnr, 999.0))) for each in results
    ]
    table = own_table(DEMO_FILES.model).name
    path = save_results("step_cache", {"processor": processor(), "threads": 1, "table": table, "results": rows})
    draw(results, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
