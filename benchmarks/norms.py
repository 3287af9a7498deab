"""Norms, rotation and packing of rows as TritonOps has them, against another version of that file, in one run.

    git show main:fused/triton_ops.py > /tmp/before.py    # with the present kernels of LayerNorm, if it imports them
    python benchmarks/norms.py --before /tmp/before.py --sweep --out /tmp/norms.json

At the shapes of Wan 14B, Wan 1.3B and FramePack, a chunk of rows at a time, the versions in turn. Shown are
microseconds (the median, caches cold), terabytes read and written per second, and how far the bf16 result is from the
same step in fp32, root mean square. `--sweep` tries other numbers of warps and of heads at once as well.
`--tiny` runs small rows under TRITON_INTERPRET=1, where times mean nothing: for trying the script.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lowvram_video.fused import triton_ops
from lowvram_video.fused.eager import EagerOps
from lowvram_video.fused.ops import SMALLEST_SCALE, NormedRows, Rope
from lowvram_video.system.atomic_files import write_file
from measure import cold_seconds, machine
from torch import Tensor

EPS = 1e-6
ROUNDS, REPEATS = 2, 20
WARPS, HEADS = (2, 8), ((4, 1), (8, 1), (8, 4), (16, 4))  # beside those it has


@dataclass(frozen=True)
class Shape:
    """Rows of a model; `by_head`: its norms of q and k are head by head."""

    model: str
    rows: int
    heads: int
    head_dim: int = 128
    by_head: bool = False

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


SHAPES = (Shape("Wan 14B", 8192, 40), Shape("Wan 1.3B", 8192, 12), Shape("FramePack", 8192, 24, by_head=True))
TINY = (Shape("tiny", 5, 3, 8), Shape("tiny by head", 5, 3, 8, by_head=True))


@dataclass(frozen=True)
class Version:
    """A file of kernels, and constants of it that are set meanwhile."""

    name: str
    file: ModuleType
    constants: tuple[tuple[str, int], ...] = ()

    @contextmanager
    def ops(self) -> Iterator[Any]:
        before = {name: getattr(self.file, name) for name, _ in self.constants}
        try:
            for name, value in self.constants:
                setattr(self.file, name, value)
            yield self.file.TritonOps()
        finally:
            for name, value in before.items():
                setattr(self.file, name, value)


@dataclass(frozen=True)
class Step:
    """Something that is done with rows, which may be changed by it, and what it reads and writes of each number.

    `made` is what it made, as numbers, of what it returned: that is not timed. `needs`: what a version must have.
    """

    run: Callable[[Any, Tensor], Any]
    nbytes: float
    made: Callable[[Any], Tensor] = lambda returned: returned
    needs: str = "rms_norm_"


class Steps:
    """What a block of a shape does with rows."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        self.x = randn(shape.rows, shape.dim).bfloat16()
        self._weight, self._bias = randn(shape.dim).bfloat16(), randn(shape.dim).bfloat16()
        self._shift, self._scale = randn(1, 2, shape.dim).unbind(1)
        angles = randn(shape.rows, shape.head_dim // 2)
        self._rope = Rope(angles.cos(), angles.sin())
        self._packed = torch.empty(shape.rows, shape.heads, shape.head_dim, device=device, dtype=torch.int8)
        self._scales = torch.empty(shape.rows, shape.heads, device=device)
        turned_bytes = 4 + 4 / shape.heads  # of bf16 numbers, read and written, and of angles
        self.all = {
            "modulated norm": Step(self.modulated_norm, 4),
            "affine norm": Step(self.affine_norm, 4),
            "norm in 8 bits": Step(self.norm_in_8_bits, 3, self._of_rows, "quantize_normed"),
            "rms": Step(self.rms, 4),
            "rms turned": Step(self.rms_turned, turned_bytes),
            "turned, packed": Step(self.packed_norm, turned_bytes - 1, self._of_heads, "pack_normed"),
            "pack": Step(self.pack, 3, self._of_heads),
        }

    def modulated_norm(self, ops: Any, x: Tensor) -> Tensor:
        made: Tensor = ops.modulated_norm(x, self._shift, self._scale, 0, self.shape.rows, EPS)
        return made

    def affine_norm(self, ops: Any, x: Tensor) -> Tensor:
        made: Tensor = ops.affine_norm(x, self._weight, self._bias, EPS)
        return made

    def rms(self, ops: Any, x: Tensor) -> Tensor:
        ops.rms_norm_(x, self._norm_weight, EPS, None, 0)
        return x

    def rms_turned(self, ops: Any, x: Tensor) -> Tensor:
        ops.rms_norm_(x, self._norm_weight, EPS, self._rope, 0)
        return x

    def norm_in_8_bits(self, ops: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = NormedRows(ops, x, self._weight, self._bias, EPS)
        made: tuple[Tensor, Tensor] = ops.quantize_normed(normed, torch.int8, 127.0, SMALLEST_SCALE)
        return made

    def packed_norm(self, ops: Any, x: Tensor) -> None:
        ops.pack_normed(x, self._norm_weight, EPS, self._rope, 0, self._packed, self._scales)

    def pack(self, ops: Any, x: Tensor) -> None:
        ops.pack_heads(x.view(self._packed.shape), self._packed, self._scales)

    def _of_heads(self, _: object) -> Tensor:
        return (self._packed * self._scales[..., None]).flatten(1)

    def _of_rows(self, made: tuple[Tensor, Tensor]) -> Tensor:
        values, scales = made
        return values * scales

    @property
    def _norm_weight(self) -> Tensor:
        return self._weight[: self.shape.head_dim] if self.shape.by_head else self._weight


def versions(before: Path | None, sweep: bool) -> list[Version]:
    """The file of before, the present one, and that with other constants."""
    found = []
    if before is not None:
        spec = importlib.util.spec_from_file_location("lowvram_video.fused.triton_ops_before", before)
        assert spec is not None and spec.loader is not None
        file = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(file)
        found.append(Version("before", file))
    found.append(Version("now", triton_ops))
    if sweep:
        found += [Version(f"{warps} warps", triton_ops, (("NORM_WARPS", warps),)) for warps in WARPS]
        found += [
            Version(f"{heads} heads, {warps} warps", triton_ops, (("HEADS_AT_ONCE", heads), ("HEADS_WARPS", warps)))
            for heads, warps in HEADS
        ]
    return found


def concerns(version: Version, name: str, shape: Shape) -> bool:
    """Whether a version's constants are those of this step's kernel."""
    by_heads = name == "pack" or (shape.by_head and name.startswith(("rms", "turned")))
    names = {constant for constant, _ in version.constants}
    return not names or ("HEADS_WARPS" in names) == by_heads


def measure(shape: Shape, found: list[Version], device: torch.device) -> list[dict[str, Any]]:
    """Every step of a shape by every version, all of them in turn in each round; the best round counts."""
    steps, rows = Steps(shape, device), []
    for name, step in steps.all.items():
        want = step.made(step.run(EagerOps(), steps.x.float()))
        times: dict[str, float] = {}
        errors: dict[str, float] = {}
        for version in [each for each in found if concerns(each, name, shape)] * ROUNDS:
            with version.ops() as ops:
                if not hasattr(ops, step.needs):
                    continue
                made = step.made(step.run(ops, steps.x.clone())).float()
                errors[version.name] = float((made - want).square().mean().sqrt() / want.square().mean().sqrt())
                x = steps.x.clone()
                took = cold_seconds(lambda: step.run(ops, x), device, REPEATS)  # noqa: B023 - called here
                times[version.name] = min(took, times.get(version.name, took))
        for version_name, took in times.items():
            speed = step.nbytes * shape.rows * shape.dim / took / 1e12
            error = errors[version_name]
            line = {"model": shape.model, "step": name, "version": version_name, "us": took * 1e6, "TB/s": speed}
            rows.append({**line, "error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="another version of fused/triton_ops.py")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("norms.json"))
    options = parser.parse_args()
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    found, rows = versions(options.before, options.sweep), []
    for shape in TINY if options.tiny else SHAPES:
        rows += measure(shape, found, device)
        write_file(options.out, json.dumps({"machine": machine(), "rows": rows}, indent=1).encode())
    print(f"{'model':<14}{'step':<16}{'version':<18}{'us':>8}{'TB/s':>7}{'error':>10}")
    for row in rows:
        print(
            f"{row['model']:<14}{row['step']:<16}{row['version']:<18}{row['us']:>8.1f}{row['TB/s']:>7.2f}"
            f"{row['error']:>10.2e}"
        )


if __name__ == "__main__":
    main()
