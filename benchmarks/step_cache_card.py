"""What step caches cost on a card: time and VRAM of passes that are computed and skipped, and of a run of 30 steps.

python benchmarks/step_cache_card.py /tmp --out /tmp/step_cache_card.json
python benchmarks/step_cache_card.py /tmp --cpu   # tiny sizes, to see that it works

A file of random weights of Wan 14B in fp8, of as many blocks as `--blocks`, is made in the folder where it is missing.
What a run skips depends on its video, so here each kind of pass is measured by itself, and a run of 30 steps is put
together of them: with the share of skipped steps that tables are calibrated to. Passes of all 40 blocks are those of
fewer and as many times a block's time as are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lowvram_video.sampling.caching.measure import SKIPPED_SHARE
from lowvram_video.sampling.caching.moments import Moment
from lowvram_video.sampling.caching.settings import METHODS, StepCacheSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.model import Extras
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import machine
from wan_bench import WEIGHTS, Bench, card_limits, draw

SIZE = (832, 480, 81)  # width, height, frames
STEPS, REPEATS, ALL_BLOCKS = 30, 2, 40
PROMPTS = ((0, "a"), (1, "b"))
TABLE = "wan2.1_t2v_14B"


@dataclass(frozen=True)
class Row:
    """`method` none: as without a cache. Seconds of one pass; VRAM is the allocator's peak, GiB."""

    method: str
    residuals: str
    computed: float
    skipped: float | None
    peak_gib: float
    run_seconds: float = 0.0
    added_gib: float = 0.0


def measure(bench: Bench, model: StreamedWan, method: str, residuals: str) -> Row:
    """Passes of a prompt and its negative: two steps computed, then two skipped, REPEATS times."""
    size = bench.size(SIZE)
    cached = method != "none"
    model.use_step_cache(StepCacheSettings(method, table=TABLE, residuals=residuals) if cached else None)
    model.forget_contexts()
    bench.free()
    work = wan_work(bench.config, size, 1, 2)
    model.start(model.make_plan(work, replace(card_limits(bench.device), fused=bench.on_gpu)))
    one_pass(bench, model, size, 0)  # kernels are chosen
    bench.free()
    times: dict[bool, list[float]] = {False: [], True: []}
    if model.step_cache is not None:
        model.begin_steps()
    for step, skip in enumerate([False, False, *[True, True, False] * REPEATS] if cached else [False] * 3):
        if model.step_cache is not None:
            model.at_moment(Moment(step / STEPS, (STEPS - 1) / STEPS, STEPS, step))
            model.step_cache.repeat(torch.tensor([2.0, float(skip), float(skip)]))
        seconds = [one_pass(bench, model, size, prompt) for prompt in range(2)]
        if step > 0:
            times[skip] += seconds
    if model.step_cache is not None and bench.on_gpu:
        assert model.step_cache.in_ram == (residuals == "ram")
    skipped = statistics.median(times[True]) if times[True] else None
    return Row(method, residuals, statistics.median(times[False]), skipped, bench.peak_gib())


def one_pass(bench: Bench, model: StreamedWan, size: tuple[int, int, int], prompt: int) -> float:
    width, height, frames = size
    latent = draw(bench.device, 0, 1, 16, (frames + 3) // 4, height // 8, width // 8)
    text = draw(bench.device, 100 + prompt, 1, bench.config.text_tokens, bench.config.text_dim)
    bench.wait()
    began = time.perf_counter()
    model(latent, torch.tensor([500.0], device=bench.device), text, extras=Extras(prompts=(PROMPTS[prompt],)))
    bench.wait()
    return time.perf_counter() - began


def whole_run(row: Row, block: float, blocks: int) -> float:
    """Seconds of a run's steps, two passes each, of a model of 40 blocks, one of which takes `block` seconds."""
    computed = row.computed + (ALL_BLOCKS - blocks) * block
    skips = 0 if row.skipped is None else round(SKIPPED_SHARE * STEPS)
    return 2 * ((STEPS - skips) * computed + skips * (row.skipped or 0.0))


def table(rows: list[Row], plain: float) -> str:
    lines = [
        f"{'cache':<13}{'residuals':<11}{'computed s':>11}{'skipped s':>11}{'VRAM GiB':>10}{'added':>8}"
        f"{f'{STEPS} steps s':>13}{'times':>7}"
    ]
    for row in rows:
        skipped = "" if row.skipped is None else f"{row.skipped:.3f}"
        lines.append(
            f"{row.method:<13}{row.residuals:<11}{row.computed:>11.3f}{skipped:>11}{row.peak_gib:>10.2f}"
            f"{row.added_gib:>8.2f}{row.run_seconds:>13.1f}{plain / row.run_seconds:>7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the file of weights is made, some GB")
    parser.add_argument("--blocks", type=int, default=6, help="of 40")
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    bench = Bench(options.folder, options.blocks, not options.cpu)
    bench.write_files([WEIGHTS["fp8"]])
    with torch.inference_mode():
        model = bench.open("fp8", False, None)
        cases = [("none", "-"), *((method, place) for method in METHODS for place in ("vram", "ram"))]
        found = [measure(bench, model, *case) for case in cases]
    plain, first = found[:2]
    assert first.skipped is not None  # by teacache, which runs no block then
    block = max(0.0, plain.computed - first.skipped) / bench.blocks
    rows = [
        replace(each, run_seconds=whole_run(each, block, bench.blocks), added_gib=each.peak_gib - plain.peak_gib)
        for each in found
    ]
    result = {"machine": machine(), "blocks": bench.blocks, "skipped_share": SKIPPED_SHARE}
    result["rows"] = [asdict(row) for row in rows]
    if options.out is not None:
        write_file(options.out, json.dumps(result, indent=1).encode())
    print(table(rows, rows[0].run_seconds))


if __name__ == "__main__":
    main()
