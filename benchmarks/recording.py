"""What keeping a run's steps costs, and how soon a paused run has given its VRAM back.

    python benchmarks/recording.py /tmp/14b_fp8.safetensors --out recording.json

Steps of a Wan model are made in turn with and without a record of them, as `generate` makes them (one pass, and the
latents watched): the medians' difference is the cost. Then passes are interrupted at random moments, as Cancel and
Ctrl-C do it, between two blocks; told is how long it takes from that moment until the VRAM is free again.
The file is made where it is not there: 12 of the model's 40 blocks (`--blocks`), which is some 4 GiB and 40 s in all on
an H200. What recording costs does not depend on the blocks, so its share of a step of all of them is that of these
steps by 12/40; both are told. Everything is printed, and written to --out, as it is found. `--tiny` runs a tiny model
on a CPU, where nothing is measured: for trying the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from draws import TINY
from lowvram_video.runtime.latent_watch import LatentWatch
from lowvram_video.runtime.recorded_run import RecordedRun
from lowvram_video.runtime.run_limits import run_limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import bench_device, machine
from synthetic import CONFIGS, write_checkpoint
from torch import Tensor

MOST_SHARE, MOST_SECONDS = 0.01, 2.0  # of a step that recording may cost, and until the VRAM is free


class Paused(BaseException):
    """As ComfyUI's interrupt and Ctrl-C."""


@dataclass
class Pause:
    """Called between blocks; raises once the moment has come."""

    wanted: threading.Event = field(default_factory=threading.Event)
    asked_at: float = 0.0

    def after(self, seconds: float) -> None:
        """Be asked for so much later, from another thread, as a user does it."""
        self.wanted.clear()
        timer = threading.Timer(seconds, self._ask)
        timer.daemon = True
        timer.start()

    def _ask(self) -> None:
        self.asked_at = time.perf_counter()
        self.wanted.set()

    def __call__(self) -> None:
        if self.wanted.is_set():
            self.wanted.clear()
            raise Paused


class Steps:
    """A model at work on one video: steps of it, timed."""

    def __init__(self, model: StreamedWan, size: tuple[int, int, int]):
        self.model, device = model, model.settings.device
        work = wan_work(model.config, size)
        self.plan = model.make_plan(work, run_limits(model.settings, model.model.execution))
        channels = model.config.out_channels
        self.latent = torch.randn(1, channels, *work.latent_size, device=device)
        self.text = torch.randn(1, model.config.text_tokens, model.config.text_dim, device=device)
        model.start_fitting(self.plan)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        velocity = self.model(x, (sigma * 1000).reshape(1).to(x.device), self.text)
        return x - sigma.to(x.device) * velocity

    def timed(self, folder: Path | None, num_steps: int) -> list[float]:
        """Seconds of each step of a run, which is recorded where there is a folder for it."""
        seconds = []
        watch = LatentWatch("random weights")
        with RecordedRun(folder, [self.model], lambda: {"run": str(folder)}) as run:
            denoise, x = run.recorded(self), self.latent
            for step in range(num_steps):
                synchronize()
                began = time.perf_counter()
                sigma = torch.tensor(1.0 - step / num_steps)
                denoised = denoise(x, sigma)
                x = torch.lerp(x, denoised, 1 / num_steps)
                run.end_step()
                watch.step(step, num_steps + 1, denoised, x)
                synchronize()
                seconds.append(time.perf_counter() - began)
        return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def recording(steps: Steps, num_steps: int, rounds: int, num_blocks: int) -> dict[str, Any]:
    """Medians of steps with and without a record, in turn; `num_blocks` has the whole model."""
    found: dict[bool, list[float]] = {False: [], True: []}
    tell(f"the first step took {steps.timed(None, 1)[0]:.2f} s")
    for number in range(rounds):
        for kept in (False, True) if number % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                seconds = steps.timed(Path(folder) if kept else None, num_steps)
            found[kept] += seconds[1:]  # the first one meets what the other left in caches
            tell(f"{'recorded' if kept else 'plain'}: {', '.join(f'{each:.4f}' for each in seconds)} s")
    plain, kept_seconds = (statistics.median(found[kept]) for kept in (False, True))
    share = kept_seconds / plain - 1
    return {
        "step_seconds": plain,
        "recorded_step_seconds": kept_seconds,
        "share": share,
        "share_of_all_blocks": share * steps.model.config.num_layers / num_blocks,
        "steps_each": len(found[True]),
        "answer_mib": steps.latent.numel() * 4 / 2**20,
        "all_seconds": {"plain": found[False], "recorded": found[True]},
    }


def pausing(steps: Steps, pause: Pause, step_seconds: float, count: int) -> dict[str, Any]:
    """Seconds from a pause until the VRAM is as free as before the model was started, at random moments of a step."""
    draw, rows = random.Random(1), []
    for _ in range(count):
        steps.model.stop()
        empty()
        before = free_bytes()
        steps.model.start_fitting(steps.plan)
        synchronize()
        held = before - free_bytes()
        pause.after(draw.uniform(0.1, 1.5) * step_seconds)
        took = paused(steps, pause)
        rows.append({"seconds": took, "held_gib": held / 2**30, "left_gib": max(0, before - free_bytes()) / 2**30})
        tell(f"paused: {took:.2f} s until {held / 2**30:.2f} GiB were free, {rows[-1]['left_gib']:.3f} GiB are left")
    return {"pauses": rows, "most_seconds": max(row["seconds"] for row in rows)}


def paused(steps: Steps, pause: Pause) -> float:
    """Run until the pause strikes; seconds from when it was asked for until all is given back."""
    try:
        for _ in range(1000):
            steps(steps.latent, torch.tensor(0.5))
    except Paused:
        pass
    steps.model.stop()
    empty()
    synchronize()
    return time.perf_counter() - pause.asked_at


def empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--config", default="14b")
    parser.add_argument("--dtype", default="fp8")
    parser.add_argument("--size", type=int, nargs=3, default=[832, 480, 81], metavar=("WIDTH", "HEIGHT", "FRAMES"))
    parser.add_argument("--blocks", type=int, default=12, help="of the model, where its file is made")
    parser.add_argument("--vram-budget", type=float, default=4.0, metavar="GIB")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pauses", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for part in measure(options):
        result |= part
        if options.out is not None:
            write_file(options.out, json.dumps(result, indent=1).encode())
    cost, most, blocks = result["recording"], result["pause"]["most_seconds"], result["blocks"]
    print(
        f"a step of {blocks} {cost['step_seconds']:.4f} s, recorded {cost['recorded_step_seconds']:.4f} s: "
        f"{cost['share']:+.2%}; of one of all blocks {cost['share_of_all_blocks']:+.2%}"
    )
    print(f"paused: VRAM free after at most {most:.2f} s ({len(result['pause']['pauses'])} pauses)")
    print("as wanted" if cost["share_of_all_blocks"] <= MOST_SHARE and most <= MOST_SECONDS else "NOT as wanted")


@torch.inference_mode()
def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All figures, as they are found."""
    device = bench_device()
    config = TINY["14b"] if options.tiny else CONFIGS[options.config]
    if not options.model.exists():
        write_checkpoint(options.model, config, options.dtype, device.type, options.blocks)
        tell(f"{options.model}: {options.model.stat().st_size / 2**30:.2f} GiB are made")
    pause = Pause()
    budget = options.vram_budget if device.type == "cuda" else None
    model = StreamedWan(options.model, RunSettings(device, vram_budget_gib=budget), between_blocks=pause)
    steps = Steps(model, tuple(options.size))
    blocks = f"{model.config.num_layers} of {config.num_layers} blocks"
    tell(f"started: {blocks}, {steps.plan.blocks.num_streamed} streamed")
    yield {
        "machine": machine(), "model": options.model.name, "blocks": blocks, "size": options.size,
        "vram_budget_gib": budget, "streamed": steps.plan.blocks.num_streamed,
    }  # fmt: skip
    cost = recording(steps, options.steps, options.rounds, config.num_layers)
    yield {"recording": cost}
    yield {"pause": pausing(steps, pause, cost["step_seconds"], options.pauses)}
    model.release()


BEGAN = time.perf_counter()


def tell(what: str) -> None:
    """At once: a run that is cut off has said how far it came."""
    print(f"{time.perf_counter() - BEGAN:6.1f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
