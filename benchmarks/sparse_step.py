"""Sparse steps against dense ones, the error that a run measures against the true one, and what measuring it costs.

    python benchmarks/sparse_step.py /tmp --out /tmp/sparse_step.json
    python benchmarks/sparse_step.py /tmp --parts errors,480p,framepack --out /tmp/sparse_step.json
    python benchmarks/sparse_step.py /tmp --parts denoise --out /tmp/sparse_step.json    # 20 steps at 720p, two minutes

Wan 14B and FramePack of random weights, fp8 files with fp8 products, all blocks streamed; files are made in the folder
where they are missing. FramePack has a quarter of its blocks: what is compared is sparse against dense. Beside "bound"
rows the same share of blocks is kept as without: the difference is what measuring costs. `--tiny` tries all of it on a
CPU, with the package's reference in place of its kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lowvram_video.attention.backend import AttentionSpec, Backend, BlockChoice, SparseBackend
from lowvram_video.attention.probe import relative_error
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
from synthetic import CONFIGS, write_checkpoint

TOP_K = SparseSettings(top_k=0.15, bound=None, dense_percent=0)
BOUND = replace(TOP_K, bound=1.0)
TAU = SparseSettings(tau=1.0, bound=0.1, dense_percent=0)
SCHEDULED = SparseSettings(top_k=0.15, bound=None)  # its first steps dense, as by default
RUN_STEPS, SHIFT = 20, 5.0


@dataclass(frozen=True)
class Row:
    """One line: `sparse` None is dense, by the attention backend of this name."""

    name: str
    sparse: SparseSettings | None = None
    attention: str = "auto"
    steps: int = 3


ROWS = (
    Row("dense"),
    Row("sparse top-k 0.15", TOP_K, steps=9),  # nine: what the bound costs is less than the noise of three
    Row("sparse top-k 0.15, bound", BOUND, steps=9),
    Row("sparse tau 1.0, bound 0.1", TAU, steps=9),  # from the careful end on
    Row("dense int8_attention", attention="int8_attention", steps=1),
)
WAN_SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81)}
FRAMEPACK_SIZES = {"640x608": (608, 640), "960x544": (544, 960)}


class Reference(SolAttention):
    """The package's plain PyTorch, where no GPU is."""

    def __init__(self) -> None:
        super().__init__(
            torch.device("cpu"), replace(SolAttention.__init__.__defaults__[0], capability=lambda _: (8, 0))
        )
        reason = self.refuse(AttentionSpec(torch.device("cpu"), torch.bfloat16, 128))
        assert reason is None, reason

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockChoice) -> torch.Tensor:
        return self.reference(q, k, v, blocks).to(q.dtype)


class Bench:
    def __init__(self, folder: Path, out: Path, tiny: bool) -> None:
        self.folder, self.out, self.tiny = folder, out, tiny
        self.device = torch.device("cpu" if tiny else "cuda", None if tiny else 0)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.found: dict[str, Any] = {"machine": machine(), "parts": {}}
        self.kernel: SparseBackend = Reference() if tiny else select_sparse(AttentionSpec(self.device, self.dtype, 128))

    def keep(self, part: str, rows: list[dict[str, Any]]) -> None:
        self.found["parts"][part] = rows
        write_file(self.out, json.dumps(self.found, indent=1).encode())

    # The error, by kernels alone

    def errors(self) -> list[dict[str, Any]]:
        """The true error of all rows and heads, and that of the samples of four steps; and all blocks as sinks."""
        lengths = (640, 1000) if self.tiny else (20480, 32760, 75600)
        dense = select_attention("auto", AttentionSpec(self.device, self.dtype, 128))
        rows = []
        for length in lengths:
            q, k, v = self.planted(length, heads=2 if self.tiny else 10)
            expected = dense.attend(q, k, v)
            everything = (0, -(-length // 64))
            for blocks in (BlockChoice(tau=1.0), BlockChoice(top_k=0.15), BlockChoice(sinks=everything)):
                out = self.kernel.attend(q, k, v, blocks)
                look = partial(compare, q[0], k[0], v[0], out[0])
                sums = torch.stack([look(Samples(self.device, step), blocks) for step in range(4)]).sum(0)
                difference, norm, density = sums.tolist()
                rows.append(
                    {
                        "tokens": length,
                        "blocks": "all sinks" if blocks.sinks != (0, 0) else f"{blocks.tau:g}, {blocks.top_k:g}",
                        "true": relative_error(out, expected),
                        "measured": (difference / norm) ** 0.5,
                        "density": density / 4,
                        "milliseconds": 1e3 * self.seconds(partial(self.kernel.attend, q, k, v, blocks)),
                        "dense_milliseconds": 1e3 * self.seconds(partial(dense.attend, q, k, v)),
                        "sample_milliseconds": 1e3 * self.seconds(partial(look, Samples(self.device, 9), blocks)),
                    }
                )
        return rows

    def planted(self, length: int, heads: int) -> tuple[torch.Tensor, ...]:
        """Tokens of a place attend what is alike: 64 directions, that change every few hundred tokens."""
        generator = torch.Generator(self.device).manual_seed(length)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        groups = torch.arange(length, device=self.device) // 200 % 64
        centres = randn(64, heads, 128)
        q, k, v = (0.6 * centres[groups] + randn(length, heads, 128) for _ in range(3))
        return tuple(each[None].to(self.dtype) for each in (q, k, v))

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

    def wan(self, sizes: Sequence[str]) -> None:
        config = WanConfig("t2v", 256, 512, 2, 3) if self.tiny else CONFIGS["14b"]
        assert isinstance(config, WanConfig)
        model = StreamedWan(self.file("fp8", config), self.settings)
        for name in sizes:
            width, height, frames = (256, 256, 5) if self.tiny else WAN_SIZES[name]
            work = wan_work(model.config, (width, height, frames))
            generator = torch.Generator(self.device).manual_seed(0)
            latent = torch.randn(1, 16, *work.latent_size, device=self.device, generator=generator)
            text = torch.randn(1, 512, model.config.text_dim, device=self.device, generator=generator)
            timestep = torch.full((1,), 700.0, device=self.device)
            self.rows(f"wan {name}", model, work, partial(model, latent, timestep, text))
        model.release()

    def denoise(self) -> None:
        """A whole run by the default schedule, Euler's steps; nothing of it is left out of the time."""
        config = WanConfig("t2v", 256, 512, 2, 3) if self.tiny else CONFIGS["14b"]
        assert isinstance(config, WanConfig)
        model = StreamedWan(self.file("fp8", config), self.settings)
        width, height, frames = (256, 256, 5) if self.tiny else WAN_SIZES["720p"]
        work = wan_work(model.config, (width, height, frames))
        row = Row("20 steps, dense until 25 %, top-k 0.15", SCHEDULED)
        with torch.inference_mode(), self.started(model, work, row) as planned:
            generator = torch.Generator(self.device).manual_seed(0)
            latent = torch.randn(1, 16, *work.latent_size, device=self.device, generator=generator)
            text = torch.randn(1, 512, model.config.text_dim, device=self.device, generator=generator)
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
            found = {
                "name": row.name,
                "seconds": seconds,
                "denoise": sum(seconds),
                "finite": bool(latent.isfinite().all()),
            }
        model.release()
        self.keep("denoise 720p", [found | planned])

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

    def file(self, name: str, config: Any) -> Path:
        path = self.folder / f"{name}{'_tiny' if self.tiny else ''}.safetensors"
        if not path.exists():
            write_checkpoint(path, config, "fp8", str(self.device))
        return path

    def rows(self, part: str, model: StreamedModel[Any], work: WorkSize, step: Callable[[], torch.Tensor]) -> None:
        done: list[dict[str, Any]] = []
        dense_out: list[torch.Tensor] = []
        for row in ROWS:
            if self.tiny and row.attention != "auto":
                continue
            with torch.inference_mode(), self.started(model, work, row) as planned:
                found: dict[str, Any] = {"name": row.name, **planned}
                try:
                    out, found["seconds"] = self.steps(model, row, step)
                    found["step"] = statistics.median(found["seconds"][1:])
                    found["difference"] = relative_error(out, dense_out[0]) if dense_out else 0.0
                    dense_out = dense_out or [out.clone()]
                    found |= self.watched(model)
                except (RuntimeError, ValueError) as error:
                    found["error"] = str(error)[:300]
            if self.device.type == "cuda":
                found["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            done.append(found)
            self.keep(part, done)

    def steps(
        self, model: StreamedModel[Any], row: Row, step: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, list[float]]:
        watch, seconds, out = model.model.execution.watch, [], torch.empty(0)
        for number in range(row.steps + 1):
            if watch is not None and row.sparse == BOUND:  # what is kept is that of the row without a bound
                watch.collect()
                watch.restore(torch.zeros(watch.num_layers, 4, dtype=torch.float64))
            model.at_step(number, row.steps + 1)
            self.settle()
            began = time.perf_counter()
            out = step()
            self.settle()
            seconds.append(time.perf_counter() - began)
        return out, seconds

    def watched(self, model: StreamedModel[Any]) -> dict[str, Any]:
        watch = model.model.execution.watch
        readings = () if watch is None else watch.readings()
        last = [each for each in readings if each.step == max(one.step for one in readings)]
        errors = [each.error for each in last if each.error is not None]
        known = [each.density for each in last if each.density is not None]
        looked = len(known) == len(last)
        return {
            "sparse_layers": sum(each.sparse for each in last),
            "density": (statistics.mean(known) if known else 1.0) if looked else None,
            "measured_error": sum(errors) / len(errors) if errors else None,
            "largest_error": max(errors, default=None),
            "attention_seconds": sum(each.seconds for each in last),
        }

    @contextmanager
    def started(self, model: StreamedModel[Any], work: WorkSize, row: Row) -> Iterator[dict[str, Any]]:
        model.stop()
        spec = AttentionSpec(self.device, self.dtype, 128)
        attention: Backend = select_attention(row.attention, spec)
        watch = None
        if row.sparse is not None:
            sparse = replace(row.sparse, min_tokens=0) if self.tiny else row.sparse
            watch = AttentionRun(attention, len(model.blocks), model.config.num_heads, self.kernel, sparse)
        elif not attention.exact:
            watch = AttentionRun(attention, len(model.blocks), model.config.num_heads)
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
        yield {
            "predicted_gib": (memory.total - memory.context) / GIB,
            "streamed": plan.blocks.num_streamed,
            "tokens": work.tokens,
        }
        model.stop()


def table(found: dict[str, Any]) -> str:
    lines = []
    for part, rows in found["parts"].items():
        if part == "errors":
            names = ("true", "measured", "density", "ms", "dense", "sample")
            lines.append(f"{'tokens':>8}  {'tau, top-k':<14}" + "".join(f"{name:>9}" for name in names))
            lines += [
                f"{row['tokens']:>8}  {row['blocks']:<14}"
                + "".join(f"{row[name]:>9.4f}" for name in ("true", "measured", "density"))
                + "".join(f"{row[f'{name}milliseconds']:>9.2f}" for name in ("", "dense_", "sample_"))
                for row in rows
            ]
            continue
        lines.append(
            f"{part:<30}{'s/step':>8}{'error':>8}{'largest':>9}{'density':>9}{'output':>8}{'GiB':>7}{'plan':>7}"
        )
        for row in rows:
            if "error" in row:
                lines.append(f"  {row['name']:<28} FAILED {row['error']}")
                continue
            if "denoise" in row:
                lines.append(f"  {row['name']:<28} whole denoise {row['denoise']:.1f} s")
                continue
            error, largest = (row[name] or 0.0 for name in ("measured_error", "largest_error"))
            density = "-" if row["density"] is None else f"{row['density']:.3f}"
            lines.append(
                f"  {row['name']:<28}{row['step']:>9.3f}{error:>9.3f}{largest:>9.3f}{density:>9}"
                f"{row['difference']:>9.3f}{row.get('allocated_gib', 0):>9.2f}{row['predicted_gib']:>9.2f}"
            )
        steps = {row["name"]: row["step"] for row in rows if "step" in row}
        if {"dense", "sparse top-k 0.15", "sparse top-k 0.15, bound"} <= set(steps):
            dense, sparse, bound = (steps[row.name] for row in ROWS[:3])
            lines.append(
                f"  the bound costs {100 * (bound / sparse - 1):.1f} % of a sparse step; 20 steps, five of them dense: "
                f"{5 * dense + 15 * sparse:.0f} s by these (computed)"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files of random weights are, or are made")
    parser.add_argument("--parts", default="errors,480p,720p,framepack")
    parser.add_argument("--out", type=Path, default=Path("sparse_step.json"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    bench, parts = Bench(options.folder, options.out, options.tiny), options.parts.split(",")
    with torch.inference_mode():
        if "errors" in parts:
            bench.keep("errors", bench.errors())
    if sizes := [part for part in parts if part in WAN_SIZES]:
        bench.wan(sizes)
    if "denoise" in parts:
        bench.denoise()
    if "framepack" in parts:
        bench.framepack(list(FRAMEPACK_SIZES))
    print(table(bench.found))


if __name__ == "__main__":
    main()
