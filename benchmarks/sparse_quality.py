"""What sparse and 8-bit attention and fp8 products do to the videos of a trained model of 10,300 tokens.

    python -m lowvram_video.benchmarks.demo.train --out /tmp/long --init demo --vae-seconds 0 --long
    python benchmarks/sparse_quality.py /tmp/long --num 8 --out /tmp/sparse_quality.json
    python benchmarks/sparse_quality.py /tmp/long --num 8 --rows "int8_attention; fp8 products"   # beside dense only

The model is the demo model's sibling, trained by the first line. Each row makes the same clips: how many show what they
should, how far they are from those of dense attention (PSNR), what attention was off by as the run measured it, and
the share of blocks that it computed. Prompts in the snow are left out: the demo's autoencoder knows 17 frames, and in
longer clips loses that ground. Last, the error of all rows of q beside the one that the run's samples measure, on
queries and keys of this model. Several processes share the rows, so nothing is timed. `--tiny` tries what a CPU can.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lowvram_video.attention.backend import AttentionSpec, Backend, BlockChoice, SparseBackend
from lowvram_video.attention.select import select_attention, select_sparse
from lowvram_video.attention.sparse.settings import PRESETS, SparseSettings
from lowvram_video.benchmarks.demo.captions import Caption
from lowvram_video.benchmarks.demo.score import judge, pick_captions
from lowvram_video.demo.files import DEMO_FILES
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from measure import bench_device, machine, psnr
from sparse_errors import error_row, line

FIRST_SEED = 1000
CAPTURED_CALLS = 3
MOST_PSNR = 99.0  # dB, of the same bits
SPARSE_STEPS = 15  # that a run of 20 has: it looks at other rows in each
CHOICES = (BlockChoice(tau=1.0), BlockChoice(tau=1.5), BlockChoice(top_k=0.3), BlockChoice(top_k=0.15))


@dataclass(frozen=True)
class Row:
    """One way to make the clips."""

    name: str
    sparse: SparseSettings | None = None
    attention: str = "sdpa"
    quantization: str = "none"


ROWS = (
    Row("dense"),
    *(Row(f"sparse {name}", settings) for name, settings in PRESETS.items()),
    *(Row(f"sparse top-k {share:g}", SparseSettings(top_k=share, bound=None)) for share in (0.5, 0.3, 0.15)),
    Row("sparse top-k 0.15, all steps", SparseSettings(top_k=0.15, bound=None, dense_percent=0)),
    Row("int8_attention", attention="int8_attention"),
    Row("fp8 products", quantization="fp8_fast"),
    Row("sparse fast, fp8 products", PRESETS["fast"], quantization="fp8_fast"),
)


class Capture:
    """A sparse backend that keeps q, k and v of some calls, and leaves nothing out."""

    name = "capture"

    def __init__(self, dense: Backend) -> None:
        self._dense, self.workspace, self.calls = dense, dense.workspace, 0
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def refuse(self, spec: AttentionSpec) -> str | None:
        return None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockChoice) -> torch.Tensor:
        return self.reference(q, k, v, blocks)

    def reference(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockChoice) -> torch.Tensor:
        self.calls += 1
        if self.calls % 23 == 5 and len(self.kept) < CAPTURED_CALLS:
            self.kept.append((q.clone(), k.clone(), v.clone()))
        return self._dense.attend(q, k, v)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny, self.out, self.device = options.tiny, options.out, bench_device()
        folder = DEMO_FILES.model.parent if options.tiny else options.folder
        self.files = replace(
            DEMO_FILES, **{name: folder / getattr(DEMO_FILES, name).name for name in ("model", "text_encoder", "vae")}
        )
        size = {"width": 96, "height": 96, "num_frames": 17, "shift": 3.0, "num_steps": 4}
        if not options.tiny:
            size = {"width": 160, "height": 160, "num_frames": 409, "shift": 10.0, "num_steps": 20}
        self.request = WanRequest("", negative_prompt="", **size)
        self.captions: Sequence[Caption] = [each for each in pick_captions(64) if each.place != "in the snow"][
            : options.num
        ]
        self.found: dict[str, Any] = {
            "machine": machine(),
            "request": size,
            "num": options.num,
            "rows": [],
            "errors": [],
        }

    def keep(self) -> None:
        write_file(self.out, json.dumps(self.found, indent=1).encode())

    def pipeline(self, row: Row) -> WanPipeline:
        sparse = None if row.sparse is None else replace(row.sparse, min_tokens=0)
        settings = RunSettings(
            self.device, sparse=sparse, attention_mode=row.attention, quantization=row.quantization, keep_loaded=True
        )
        return WanPipeline(self.files, settings)

    def clips(self, row: Row) -> tuple[torch.Tensor, dict[str, Any]]:
        """The clips `[N, T, H, W, 3]`, and what was measured."""
        pipeline, clips, readings = self.pipeline(row), [], []
        for index, caption in enumerate(self.captions):
            request = replace(self.request, prompt=caption.text, seed=FIRST_SEED + index)
            clips.append(torch.cat(list(pipeline.generate(request))).cpu())
            readings += [each for each in pipeline.report().attention if each.sparse or row.attention != "sdpa"]
        errors = [each.error for each in readings if each.error is not None]
        densities = [each.density for each in readings if each.density is not None]
        pipeline.release()
        return torch.stack(clips), {
            "name": row.name,
            "density": statistics.mean(densities) if densities else None,  # None: not looked at
            "error": statistics.mean(errors) if errors else None,
            "largest_error": max(errors, default=None),
        }

    def rows(self, rows: Sequence[Row]) -> None:
        """The dense one, and these."""
        dense = torch.empty(0)
        for row in rows:
            if self.tiny and (row.sparse is not None or row.attention != "sdpa"):
                continue
            try:
                clips, found = self.clips(row)
            except (RuntimeError, ValueError) as error:
                self.found["rows"].append({"name": row.name, "failed": str(error)[:300]})
                continue
            dense = clips if not len(dense) else dense
            verdicts = [judge(clip.float() / 255, caption) for clip, caption in zip(clips, self.captions, strict=True)]
            found["right"] = sum(verdict.all_right for verdict in verdicts)
            found["psnr"] = statistics.mean(
                min(MOST_PSNR, psnr(one, other)) for one, other in zip(clips, dense, strict=True)
            )
            self.found["rows"].append(found)
            self.keep()

    def errors(self) -> None:
        """Of all rows of q, and of the samples that a run looks at."""
        spec = AttentionSpec(self.device, torch.bfloat16, 128)
        dense = select_attention("sdpa", spec)
        capture = Capture(dense)
        pipeline = self.pipeline(Row("capture", SparseSettings(bound=None, dense_percent=0, dense_layers=0)))
        kernel: SparseBackend = select_sparse(spec)
        watch = pipeline.high.model.execution.watch
        assert watch is not None
        watch.sparse = capture
        request = replace(self.request, prompt=self.captions[0].text, seed=FIRST_SEED)
        for _ in pipeline.generate(request):
            pass
        for call, qkv in enumerate(capture.kept):
            expected = dense.attend(*qkv)
            rows = [error_row(kernel, qkv, expected, blocks, SPARSE_STEPS) for blocks in CHOICES]
            self.found["errors"] += [{"call": call, **row} for row in rows]
        pipeline.release()
        self.keep()


def table(found: dict[str, Any]) -> str:
    lines = [f"{'row':<32}{'right':>9}{'PSNR':>8}{'density':>9}{'error':>8}{'largest':>9}"]
    for row in found["rows"]:
        if "failed" in row:
            lines.append(f"{row['name']:<32} FAILED {row['failed']}")
            continue
        density, error, largest = (
            "-" if row[name] is None else f"{row[name]:.3f}" for name in ("density", "error", "largest_error")
        )
        lines.append(
            f"{row['name']:<32}{row['right']:>4} of {found['num']:<3}{row['psnr']:>6.1f}{density:>9}"
            f"{error:>8}{largest:>9}"
        )
    lines += [f"call {row['call']}{line(row)}" for row in found["errors"]]
    return "\n".join(lines)


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """Beside the dense one."""
    names = [name.strip() for name in options.rows.split(";") if name.strip()]
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        raise SystemExit(f"--rows names {sorted(unknown)}: rows are {[row.name for row in ROWS]}, separated by ';'.")
    return [row for row in ROWS[1:] if not names or row.name in names]


def in_parallel(options: argparse.Namespace) -> dict[str, Any]:
    """What several processes found, each of some of the rows."""
    shares = [chosen_rows(options)[part :: options.workers] for part in range(options.workers)]
    parts = [options.out.with_name(f"{options.out.stem}_{part}.json") for part in range(options.workers)]
    processes = []
    for part, path in enumerate(parts):
        path.unlink(missing_ok=True)
        command = [sys.executable, __file__, str(options.folder), "--num", str(options.num), "--out", str(path)]
        command += ["--rows", options.rows]
        processes.append(subprocess.Popen([*command, "--workers", str(options.workers), "--part", str(part)]))
    for process in processes:
        process.wait()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in parts if path.exists()]
    rows = {row["name"]: row for each in found for row in each["rows"]}
    missing = [row.name for share in shares for row in share if row.name not in rows]
    errors = [error for each in found for error in each["errors"]]
    ordered = [rows[row.name] for row in ROWS if row.name in rows]
    return {**found[0], "rows": ordered, "errors": errors, "missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sibling's three files")
    parser.add_argument("--num", type=int, default=8, help="clips per row")
    parser.add_argument("--workers", type=int, default=5, help="processes")
    parser.add_argument("--out", type=Path, default=Path("sparse_quality.json"))
    parser.add_argument("--rows", default="", help="only these, separated by ';', and no errors of single calls")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None and not options.tiny:
        found = in_parallel(options)
        write_file(options.out, json.dumps(found, indent=1).encode())
        print(table(found))
        return
    bench = Bench(options)
    if options.part == 0 and not options.rows:
        try:
            bench.errors()
        except (RuntimeError, ValueError) as error:
            print(f"errors: {error}", flush=True)
    rows = chosen_rows(options)
    bench.rows([ROWS[0], *(rows if options.tiny else rows[options.part :: options.workers])])
    if options.tiny:
        print(table(bench.found))


if __name__ == "__main__":
    main()
