"""Random draws of model, format, LoRA, size, attention, products and VRAM budget: is a plan ever surprised?

    python benchmarks/random_draws.py --folder /tmp/draws --seed 1 --out draws_1.json

One process makes all draws; a second one holds all VRAM but each draw's budget, so that the context, libraries and
fragmentation count. A draw is two passes. Shown are what was planned, used and allowed, how often a pass was repeated
with a leaner plan, and for refused draws what the leanest plan uses where it is allowed to: more than the budget.
`--tiny` runs tiny models on a CPU, where nothing is measured: for trying the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from draws import TINY, TINY_SIZES, WAYS, Draw, Sizes, make_draws
from lowvram_video.memory.plan.footprint import GIB, Limits, WorkSize
from lowvram_video.memory.plan.limits import hold_allocator, hold_budget
from lowvram_video.memory.plan.plan import MemoryPlan, PlanError, plan_memory
from lowvram_video.runtime.run_limits import run_limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.lora.file import LoraChoice
from measure import Ballast, Watch, machine
from synthetic import CONFIGS, DTYPES, write_checkpoint, write_gguf, write_lora

LORA_RANK = 64
PASSES = 2
RAISED_LINES = 40  # of a traceback, the last ones
# What a run holds beside a pass, in fp32: the noise, the sample and its next one, a prediction with the prompt and one
# without, and three of the solver's history.
HELD_LATENTS = 8


class Models:
    """Opened models; the last one stays open for the next draw of its file."""

    def __init__(self, folder: Path, configs: Mapping[str, WanConfig], device: torch.device):
        self.folder, self.configs, self.device = folder, configs, device
        self.key: tuple[str, bool] | None = None
        self.model: StreamedWan | None = None

    def write(self, draws: list[Draw]) -> None:
        """The files that these draws want, where they are not there yet."""
        for name in sorted({draw.file for draw in draws}):
            model, _, stored = name.partition("_")
            write = write_checkpoint if stored in DTYPES else write_gguf
            if not self.path(name).exists():
                write(self.path(name), self.configs[model], stored, str(self.device))
            if not self.lora_path(name).exists():
                write_lora(self.lora_path(name), self.configs[model], LORA_RANK)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.{'gguf' if name.endswith('_K') else 'safetensors'}"

    def lora_path(self, name: str) -> Path:
        return self.folder / f"{name.partition('_')[0]}_lora.safetensors"

    def open(self, draw: Draw) -> StreamedWan:
        """The model of a draw, its kernels chosen as for it."""
        way = next(way for way in WAYS if way.file == draw.file)
        settings = RunSettings(self.device, attention_mode=draw.attention, vram_budget_gib=draw.budget_gib)
        if way.anew or self.key != (draw.file, draw.lora):
            self.close()
            loras = [LoraChoice(self.lora_path(draw.file))] if draw.lora else []
            read_as = draw.quantization if way.anew else "none"
            self.model = StreamedWan(self.path(draw.file), replace(settings, quantization=read_as), loras=loras)
            self.key = (draw.file, draw.lora)
        model = self.model
        assert model is not None
        if not way.anew:
            model.stop()
            model.settings = replace(settings, quantization=draw.quantization)
            model.model.execution = settings.execution(model.config.head_dim)
            busy = [module for block in model.blocks for module in block.busy_modules()]
            model.quantization = select_compute(model.model, busy, draw.quantization, self.device)
        return model

    def close(self) -> None:
        """Give host and device memory back."""
        if self.model is not None:
            self.model.release()
        self.key = self.model = None
        gc.collect()


class Card:
    """The VRAM of this machine, of which all but a draw's budget is held by another process."""

    def __init__(self, ballast: Ballast | None):
        self._ballast = ballast
        self.left_bytes = 0

    def leave(self, gib: float) -> None:
        """Leave so much to this process, its context included."""
        if self._ballast is not None:
            torch.cuda.empty_cache()
            self.left_bytes = self._ballast.leave(gib)

    @property
    def context_bytes(self) -> int:
        """What this process has now outside PyTorch's allocator."""
        if self._ballast is None:
            return 0
        return self.left_bytes - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()


class Repeats(logging.Handler):
    """Counts passes that were repeated with a leaner plan."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("out of VRAM under a plan")


@contextmanager
def repeats_of(name: str) -> Iterator[Repeats]:
    """The repeats that the logger of this name tells of meanwhile."""
    repeats, log = Repeats(), logging.getLogger(name)
    log.addHandler(repeats)
    try:
        yield repeats
    finally:
        log.removeHandler(repeats)


def limits_of(model: StreamedWan, draw: Draw) -> Limits:
    """A draw's limits, as a run of the command line has them; on a CPU those of a card without a context."""
    settings = model.settings
    if settings.device.type == "cuda":
        limits = run_limits(settings, model.model.execution)
        hold_budget(settings.device, limits)
        return limits
    return Limits(int(draw.budget_gib * GIB), context_bytes=0)


def plan_denoising(model: StreamedWan, work: WorkSize, limits: Limits) -> MemoryPlan:
    """The plan of passes alone: nothing is decoded here."""
    return plan_memory(replace(model.footprint(), vae=None), work, limits)


def run_draw(models: Models, draw: Draw, card: Card) -> dict[str, Any]:
    """One draw's figures; what it fails with is one too."""
    began = time.perf_counter()
    result: dict[str, Any] = asdict(draw)
    card.leave(draw.budget_gib)
    if torch.cuda.is_available():
        hold_allocator(torch.device("cuda"), None)
    try:
        with repeats_of("lowvram_video.runtime.streamed") as repeats:
            model = models.open(draw)
            work = wan_work(model.config, (draw.width, draw.height, draw.frames))
            limits = limits_of(model, draw)
            try:
                result |= run_plan(model, plan_denoising(model, work, limits), card)
            except PlanError as error:
                result |= run_refused(model, work, limits, error, card)
            result["repeats"] = repeats.count
    except (RuntimeError, ValueError) as error:
        result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        result["raised"] = traceback.format_exc().splitlines()[-RAISED_LINES:]
        models.close()
    result["wall_seconds"] = time.perf_counter() - began
    return result


def run_refused(model: StreamedWan, work: WorkSize, limits: Limits, refusal: PlanError, card: Card) -> dict[str, Any]:
    """What the leanest plan uses, where it may use what the refusal asks for."""
    needed = refusal.smallest_budget_bytes
    result: dict[str, Any] = {"refused": str(refusal).splitlines()[0]}
    if needed is None:
        return result
    wider = replace(limits, vram_budget_bytes=needed)
    if card.left_bytes:
        card.leave(needed / GIB)
        hold_budget(model.settings.device, wider)
    figures = run_plan(model, plan_denoising(model, work, wider), card)
    figures["exceeds"] = figures["used_gib"] > limits.vram_budget_bytes / GIB
    return result | figures


def run_plan(model: StreamedWan, plan: MemoryPlan, card: Card) -> dict[str, Any]:
    """Two passes under a plan: what was planned and what was used."""
    device = model.settings.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = card.context_bytes
    with torch.inference_mode(), Watch() if on_gpu else nullcontext() as watch:
        model.start_fitting(plan)
        started = torch.cuda.memory_allocated() if on_gpu else 0
        generator = torch.Generator(device).manual_seed(0)
        size = (1, model.config.in_channels, *plan.work.latent_size)
        latent = torch.randn(size, device=device, generator=generator)
        held = torch.zeros(HELD_LATENTS, model.config.out_channels, *plan.work.latent_size, device=device)
        text = torch.randn(1, 512, model.config.text_dim, device=device, generator=generator)
        seconds = []
        for _ in range(PASSES):
            began = time.perf_counter()
            velocity = model(latent, torch.full((1,), 700.0, device=device), text)
            finite = bool(velocity.isfinite().all())
            seconds.append(time.perf_counter() - began)
        del held
    used = card.left_bytes - watch.min_free if on_gpu and watch is not None else 0
    last = model.plan or plan
    figures = {
        "planned_gib": last.denoise.total / GIB,
        "used_gib": used / GIB,
        "off_percent": 100 * (last.denoise.total / used - 1) if used else 0.0,
        "seconds": seconds,
        "finite": finite,
        "streamed": last.blocks.num_streamed,
        "choice": asdict(last.choice),
        "lines_gib": {field.name: getattr(last.denoise, field.name) / GIB for field in fields(last.denoise)},
    }
    if on_gpu:
        figures |= {
            "context_gib": [before / GIB, card.context_bytes / GIB],
            "started_gib": started / GIB,
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "pinned_gib": model.pinned_bytes / GIB,
        }
    model.stop()
    return figures


def row(result: Mapping[str, Any], draw: Draw) -> str:
    """A draw's line."""
    if "error" in result:
        return f"{draw!s:<58}{draw.budget_gib:>7.2f}  FAILED {result['error']}"
    refused = "" if "refused" not in result else "  refused" + (": needs more" if result.get("exceeds") else " WRONGLY")
    context = result.get("context_gib", [0, 0])[1] - result["lines_gib"]["context"]
    return (
        f"{draw!s:<58}{draw.budget_gib:>7.2f}{result['planned_gib']:>8.2f}{result['used_gib']:>7.2f}"
        f"{result['off_percent']:>+7.1f}%{result['repeats']:>4}{result['streamed']:>4}{context:>+8.3f}"
        f"{result['seconds'][-1]:>7.2f}{result['wall_seconds']:>6.1f}{refused}"
    )


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that must hold."""
    ran = [r for r in results if "error" not in r and "refused" not in r]
    refused = [r for r in results if "refused" in r]
    errors = [abs(r["off_percent"]) for r in ran]
    return {
        "draws": len(results),
        "ran": len(ran),
        "failed": sum("error" in r for r in results),
        "refused": len(refused),
        "refused_wrongly": sum(not r.get("exceeds") for r in refused),
        "repeats": sum(r["repeats"] for r in ran),
        "over_budget": sum(r["used_gib"] > r["budget_gib"] for r in ran),
        "within_5_percent": sum(error <= 5 for error in errors) / max(1, len(ran)),
        "median_error_percent": statistics.median(errors) if errors else 0.0,
        "not_finite": sum(not r["finite"] for r in ran),
    }


def measure_all(models: Models, draws: list[Draw], card: Card, out: Path, seconds: float) -> list[dict[str, Any]]:
    """All draws, or as many as begin within so many seconds; what was found is written after each."""
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    print(
        f"{'draw':<58}{'budget':>7}{'planned':>8}{'used':>7}{'error':>8}{'rep':>4}{'str':>4}{'ctx':>8}{'s':>7}{'all':>6}"
    )
    for draw in draws:
        if time.perf_counter() - began > seconds:
            break
        results.append(run_draw(models, draw, card))
        print(row(results[-1], draw), flush=True)
        report = {"machine": machine(), "summary": summary(results), "draws": results}
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the models' files are, or are made")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--passed", type=int, default=0, help="draws of the seed that another run has made")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "sageattn"])
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no draw after so long")
    parser.add_argument("--segments", choices=("expandable", "fixed"), default="expandable",
                        help="PyTorch's allocator: as the command line sets it, or as ComfyUI leaves it")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.segments == "expandable":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    logging.basicConfig(level=logging.WARNING)
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if options.tiny else "cuda")
    configs = TINY if options.tiny else {name: c for name, c in CONFIGS.items() if isinstance(c, WanConfig)}
    models = Models(options.folder, configs, device)
    draws = make_draws(
        options.seed, options.draws, tuple(options.attention), configs, TINY_SIZES if options.tiny else Sizes()
    )[options.passed :]
    with nullcontext() if options.tiny else Ballast(0) as ballast:
        models.write(draws)
        results = measure_all(models, draws, Card(ballast), options.out, options.seconds)
        models.close()
    print(Counter(draw.file for draw in draws))
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
