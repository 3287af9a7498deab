"""Sparse steps against dense ones, the error that a run measures against the true one, and what measuring it costs.

    python benchmarks/sparse_step.py /tmp --out /tmp/sparse_step.json
    python benchmarks/sparse_step.py /tmp --parts errors,framepack --out /tmp/sparse_step.json
    python benchmarks/sparse_step.py /tmp --parts denoise --out /tmp/sparse_step.json    # 20 steps at 720p, two minutes
    COMFYUI_DIR=~/ComfyUI python benchmarks/sparse_step.py /tmp --parts 480p,720p,comfyui --until 480 --rows "dense;
        sparse top-k 0.15"

Wan 14B and FramePack of random weights, fp8 files with fp8 products, all blocks streamed; files are made in the folder
where they are missing. FramePack has a quarter of its blocks: what is compared is sparse against dense. Steps that also
measure their error are made in turn with those that do not, and keep the same share of blocks: the difference is what
measuring costs. ComfyUI's own steps beside are those of `comfyui_steps.py`. `--tiny` tries all of it on a CPU, with the
package's reference in place of its kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comfyui_steps
import torch
from lowvram_video.attention.backend import BLOCK, AttentionSpec, Backend, BlockChoice, SparseBackend
from lowvram_video.attention.probe import THIS_MACHINE, relative_error
from lowvram_video.attention.select import select_attention, select_sparse
from lowvram_video.attention.sol import SolAttention
from lowvram_video.attention.sparse.run import AttentionRun
from lowvram_video.attention.sparse.samples import Samples, compare
from lowvram_video.attention.sparse.settings import SparseSettings
from lowvram_video.framepack.footprint import SectionSize
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import Frames, History, StepCondition
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.memory.plan.footprint import GIB, WorkSize
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.runtime.streamed import StreamedModel
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from measure import machine
from sparse_errors import error_row, planted
from sparse_rows import ROWS, Row, table, with_cost
from synthetic import CONFIGS, write_checkpoint

SCHEDULED = SparseSettings(top_k=0.15, bound=None)  # its first steps dense, as by default
RUN_STEPS, SHIFT = 20, 5.0
WAN_SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81), "denoise": (1280, 720, 81)}
FRAMEPACK_SIZES = {"640x608": (608, 640), "960x544": (544, 960)}


class Reference(SolAttention):
    """The package's plain PyTorch, where no GPU is."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), replace(THIS_MACHINE, capability=lambda _: (8, 0)))
        reason = self.refuse(AttentionSpec(torch.device("cpu"), torch.bfloat16, 128))
        assert reason is None, reason

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockChoice) -> torch.Tensor:
        return self.reference(q, k, v, blocks).to(q.dtype)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.out, self.tiny = options.folder, options.out, options.tiny
        self.until, self.began = options.until, time.perf_counter()
        self.names = [name.strip() for name in options.rows.split(";") if name.strip()]
        if unknown := set(self.names) - {row.name for row in ROWS}:
            raise SystemExit(f"no rows {sorted(unknown)}: rows are {[row.name for row in ROWS]}")
        tiny = self.tiny
        self.device = torch.device("cpu" if tiny else "cuda", None if tiny else 0)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.found: dict[str, Any] = {"machine": machine(), "parts": {}}
        self.kernel: SparseBackend = Reference() if tiny else select_sparse(AttentionSpec(self.device, self.dtype, 128))

    def keep(self, part: str, rows: list[dict[str, Any]]) -> None:
        self.found["parts"][part] = rows
        self.found["seconds"] = time.perf_counter() - self.began
        write_file(self.out, json.dumps(self.found, indent=1).encode())

    def is_late(self, part: str, row: str) -> bool:
        """Whether nothing more is begun: what is left out is told."""
        late = time.perf_counter() - self.began > self.until
        if late:
            self.found.setdefault("left_out", []).append(f"{part}: {row}")
        return late

    # The error, by kernels alone

    def errors(self) -> list[dict[str, Any]]:
        """The true error of all rows and heads, and that of the samples of four steps; and all blocks as sinks."""
        lengths = (640, 1000) if self.tiny else (20480, 32760, 75600)
        dense = select_attention("auto", AttentionSpec(self.device, self.dtype, 128))
        rows = []
        for length in lengths:
            q, k, v = planted(length, 2 if self.tiny else 10, self.device, self.dtype)
            expected = dense.attend(q, k, v)
            everything = (0, -(-length // BLOCK))
            for blocks in (BlockChoice(tau=1.0), BlockChoice(top_k=0.15), BlockChoice(sinks=everything)):
                row = error_row(self.kernel, (q, k, v), expected, blocks, 4)
                out = self.kernel.attend(q, k, v, blocks)
                look = partial(compare, q[0], k[0], v[0], out[0], Samples(self.device, 9), blocks)
                row |= {
                    "milliseconds": 1e3 * self.seconds(partial(self.kernel.attend, q, k, v, blocks)),
                    "dense_milliseconds": 1e3 * self.seconds(partial(dense.attend, q, k, v)),
                    "sample_milliseconds": 1e3 * self.seconds(look),
                }
                rows.append(row)
        return rows

    def seconds(self, call: Callable[[], object]) -> float:
        return statistics.median(self.timed(call) for _ in range(4))

    def timed(self, call: Callable[[], object]) -> float:
        self.settle()
        began = time.perf_counter()
        call()
        self.settle()
        return time.perf_counter() - began

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # Steps

    def wan(self, parts: Sequence[str]) -> None:
        """The rows of the sizes among the parts, and the whole run."""
        model = StreamedWan(self.wan_file, self.settings)
        for name in parts:
            work, latent, timestep, text = self.clip(model, name)
            if name == "denoise":
                self.denoise(model, work, latent, text)
            else:
                self.rows(f"wan {name}", model, work, partial(model, latent, timestep, text))
        model.release()

    def clip(self, model: StreamedWan, part: str) -> tuple[WorkSize, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Its size, and a random latent, timestep and text."""
        width, height, frames = (256, 256, 5) if self.tiny else WAN_SIZES[part]
        work = wan_work(model.config, (width, height, frames))
        generator = torch.Generator(self.device).manual_seed(0)
        latent = torch.randn(1, 16, *work.latent_size, device=self.device, generator=generator)
        text = torch.randn(1, 512, model.config.text_dim, device=self.device, generator=generator)
        return work, latent, torch.full((1,), 700.0, device=self.device), text

    def denoise(self, model: StreamedWan, work: WorkSize, latent: torch.Tensor, text: torch.Tensor) -> None:
        """A whole run by the default schedule, Euler's steps; nothing of it is left out of the time."""
        row = Row(f"{RUN_STEPS} steps, dense until 25 %, top-k 0.15", SCHEDULED)
        if self.is_late("denoise 720p", row.name):
            return
        with torch.inference_mode(), self.started(model, work, row) as (planned, _):
            uniform = torch.linspace(1, 0, RUN_STEPS + 1).tolist()
            sigmas = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in uniform]
            seconds = []
            for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
                model.at_step(step, RUN_STEPS)
                timestep = torch.full((1,), 1000 * sigma, device=self.device)
                self.settle()
                began = time.perf_counter()
                latent.add_(model(latent, timestep, text), alpha=following - sigma)
                self.settle()
                seconds.append(time.perf_counter() - began)
            num_dense = round(RUN_STEPS * SCHEDULED.dense_percent / 100)
            found = {
                "name": row.name,
                "seconds": seconds,
                "denoise": sum(seconds),
                "dense_step": statistics.median(seconds[1:num_dense]),
                "sparse_step": statistics.median(seconds[num_dense:]),
                "finite": bool(latent.isfinite().all()),
            }
        self.keep("denoise 720p", [found | planned])

    def comfyui(self, names: str) -> None:
        """Its own steps of the same file."""
        rows: list[dict[str, Any]] = []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for row in comfyui_steps.chosen_rows(names, "tiny" if self.tiny else "", "--cpu" if self.tiny else ""):
            if not self.is_late("comfyui", row.name):
                rows.append(comfyui_steps.run_apart(self.wan_file, row))
                self.keep("comfyui", rows)

    def framepack(self, sizes: Sequence[str]) -> None:
        config = (
            FramePackConfig(num_heads=2, num_layers=1, num_single_layers=2)
            if self.tiny
            else FramePackConfig(num_layers=5, num_single_layers=10)
        )
        model = StreamedFramePack(self.file("framepack_quarter_fp8", config), self.settings)
        for name in sizes:
            height, width = (128, 128) if self.tiny else FRAMEPACK_SIZES[name]
            work = SectionSize(33, height, width, step_cache=False)
            inputs = self.section(model, height // 8, width // 8)
            self.rows(f"framepack {name}", model, work, partial(model, *inputs, None))
        model.release()

    def section(self, model: StreamedFramePack, height: int, width: int) -> tuple[Frames, History, StepCondition]:
        config, generator = model.config, torch.Generator(self.device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        def frames(count: int, first: int) -> Frames:
            return Frames(randn(1, config.in_channels, count, height, width), torch.arange(first, first + count))

        num_vectors = [12] * config.num_layers + [3] * config.num_single_layers
        blocks = tuple(0.1 * randn(count, config.dim).to(self.dtype) for count in num_vectors)
        condition = StepCondition(
            randn(512 + 729, config.dim).to(self.dtype), blocks, 0.1 * randn(2, config.dim).to(self.dtype)
        )
        return frames(9, 1), History(frames(3, 0), frames(2, 10), frames(16, 12)), condition

    @property
    def settings(self) -> RunSettings:
        return RunSettings(device=self.device, quantization="none" if self.tiny else "fp8_fast")

    @property
    def wan_file(self) -> Path:
        return self.file("fp8", WanConfig("t2v", 256, 512, 2, 3) if self.tiny else CONFIGS["14b"])

    def file(self, name: str, config: Any) -> Path:
        path = self.folder / f"{name}{'_tiny' if self.tiny else ''}.safetensors"
        if not path.exists():
            write_checkpoint(path, config, "fp8", str(self.device))
        return path

    def rows(self, part: str, model: StreamedModel[Any], work: WorkSize, step: Callable[[], torch.Tensor]) -> None:
        done: list[dict[str, Any]] = []
        dense_out: list[torch.Tensor] = []
        for row in ROWS:
            if (self.names and row.name not in self.names) or (self.tiny and row.attention != "auto"):
                continue
            if self.is_late(part, row.name):
                continue
            with torch.inference_mode(), self.started(model, work, row) as (planned, watches):
                found: dict[str, Any] = {"name": row.name, **planned}
                try:
                    out, seconds = self.steps(model, row, watches, step)
                    if self.device.type == "cuda":
                        found["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
                    found["difference"] = relative_error(out, dense_out[0]) if dense_out else 0.0
                    dense_out = dense_out or [out.clone()]
                    lines = [found | self.told(each, watch) for each, watch in zip(seconds, watches, strict=True)]
                    done += with_cost(lines)
                except (RuntimeError, ValueError) as error:
                    done.append(found | {"error": str(error)[:300]})
            self.keep(part, done)

    def steps(
        self,
        model: StreamedModel[Any],
        row: Row,
        watches: Sequence[AttentionRun | None],
        step: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, list[list[float]]]:
        """What the last step gave, and the seconds of each watch's steps; they take turns."""
        seconds: list[list[float]] = [[] for _ in watches]
        out, count = torch.empty(0), (row.steps + 1) * len(watches)
        for number in range(count):
            place = number % len(watches)
            model.model.execution = replace(model.model.execution, watch=watches[place])
            model.at_step(number, count)
            self.settle()
            began = time.perf_counter()
            out = step()
            self.settle()
            seconds[place].append(time.perf_counter() - began)
        return out, seconds

    def told(self, seconds: list[float], watch: AttentionRun | None) -> dict[str, Any]:
        """Of the steps of one watch."""
        readings = () if watch is None else watch.readings()
        last = [each for each in readings if each.step == max(one.step for one in readings)]
        errors = [each.error for each in last if each.error is not None]
        known = [each.density for each in last if each.density is not None]
        looked = len(known) == len(last)
        return {
            "seconds": seconds,
            "step": statistics.median(seconds[1:]),
            "sparse_layers": sum(each.sparse for each in last),
            "density": (statistics.mean(known) if known else 1.0) if looked else None,
            "measured_error": sum(errors) / len(errors) if errors else None,
            "largest_error": max(errors, default=None),
            "attention_seconds": sum(each.seconds for each in last),
        }

    @contextmanager
    def started(
        self, model: StreamedModel[Any], work: WorkSize, row: Row
    ) -> Iterator[tuple[dict[str, Any], list[AttentionRun | None]]]:
        model.stop()
        attention: Backend = select_attention(row.attention, AttentionSpec(self.device, self.dtype, 128))
        watch = self.watch(model, attention, row.sparse)
        watches = [watch]
        if row.in_turn is not None:
            other = self.watch(model, attention, row.in_turn)
            assert other is not None
            other.restore(torch.zeros(other.num_layers, 4, dtype=torch.float64))  # it keeps what the first one keeps
            watches.append(other)
        model.model.execution = replace(model.model.execution, attention=attention, watch=watch)
        workspace = attention.workspace if watch is None else watch.workspace
        budget = None if self.tiny else 120
        limits = limits_for(self.device, vram_budget_gib=budget, fused=True, attention=workspace, measure=not self.tiny)
        plan = model.make_plan(work, replace(limits, blocks_to_swap=len(model.blocks)))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model.start(plan)
        memory = plan.denoise
        planned = {
            "predicted_gib": (memory.total - memory.context) / GIB,
            "streamed": plan.blocks.num_streamed,
            "tokens": work.tokens,
        }
        yield planned, watches
        model.stop()

    def watch(
        self, model: StreamedModel[Any], attention: Backend, sparse: SparseSettings | None
    ) -> AttentionRun | None:
        shape = len(model.blocks), model.config.num_heads
        if sparse is not None:
            settings = replace(sparse, min_tokens=0) if self.tiny else sparse
            return AttentionRun(attention, *shape, self.kernel, settings)
        return None if attention.exact else AttentionRun(attention, *shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files of random weights are, or are made")
    parser.add_argument("--parts", default="errors,480p,720p,framepack")
    parser.add_argument("--out", type=Path, default=Path("sparse_step.json"))
    parser.add_argument("--rows", default="", help="of Wan and FramePack only these, separated by ';'")
    parser.add_argument("--comfyui-rows", default="", help="as --rows of comfyui_steps.py")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which nothing more is begun")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    bench, parts = Bench(options), options.parts.split(",")
    with torch.inference_mode():
        if "errors" in parts:
            bench.keep("errors", bench.errors())
    if wan := [part for part in parts if part in WAN_SIZES]:
        bench.wan(wan)
    if "framepack" in parts:
        bench.framepack(list(FRAMEPACK_SIZES))
    if "comfyui" in parts:
        bench.comfyui(options.comfyui_rows)
    print(table(bench.found))


if __name__ == "__main__":
    main()
