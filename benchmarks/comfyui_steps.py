"""A step of ComfyUI's own Wan model, as installed and with its fastest options, beside the steps of `sparse_step.py`.

    COMFYUI_DIR=~/ComfyUI python benchmarks/comfyui_steps.py /tmp/fp8.safetensors --out /tmp/comfyui_steps.json
    ... --rows "as installed; fastest options" --sizes 480x832x81

Run it with ComfyUI's own Python. The file is Wan 14B in fp8, such as `benchmarks/synthetic.py` makes; each row is a
process of its own, in which KSampler makes three steps of each size on random prompts, without guidance, after one of
the first size. What a step takes is one call of the model. `sparse_step.py --parts comfyui` has the same rows in its
own run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SIZES = {"480x832x81": (81, 480, 832), "720x1280x81": (81, 720, 1280)}
TINY = (5, 32, 32)
STEPS = 3
PACKAGES = ("comfy-kitchen", "sageattention", "torch")


@dataclass(frozen=True)
class Row:
    """ComfyUI's flags, its loader's weight_dtype, and the sizes that are timed where none are asked for."""

    name: str
    exactness: str
    flags: tuple[str, ...] = ()
    weight_dtype: str = "default"
    sizes: tuple[str, ...] = tuple(SIZES)


FASTEST = Row(
    "fastest options",
    "products in fp8 of rows that are cast without scales; attention in bf16",
    ("--fast",),
    "fp8_e4m3fn_fast",
)
ROWS = (
    Row("as installed", "fp8 weights are cast to bf16 and multiplied so; attention in bf16"),
    FASTEST,
    replace(
        FASTEST,
        name="fastest, ck attention",
        exactness="products in fp8 of rows that are cast without scales; attention in 8 bits (comfy-kitchen)",
        flags=("--fast", "--use-ck-attention"),
        sizes=("480x832x81",),
    ),
    replace(
        FASTEST,
        name="fastest, sage attention",
        exactness="products in fp8 of rows that are cast without scales; attention in 8 bits (SageAttention)",
        flags=("--fast", "--use-sage-attention"),
        sizes=("480x832x81",),
    ),
)


class Errors(logging.Handler):
    """What ComfyUI logs as errors, each once: an attention that fails runs by another one there."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()[:300]
        if message not in self.seen:
            self.seen.append(message)


def versions() -> dict[str, str]:
    """Of the packages that decide a step's time, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_row(path: Path, row: Row) -> dict[str, Any]:
    """In this process: seconds of each step by size."""
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    sys.argv = ["main.py", *row.flags]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_patcher
    import comfy.sd

    if not hasattr(comfy.model_patcher, "CoreModelPatcher"):  # main.py sets it
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcher
    import comfy.sample
    import comfy.samplers
    import comfyui_version
    import torch

    errors = Errors()
    logging.getLogger().addHandler(errors)

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times: list[float] = []

    def timed(apply: Any, told: Mapping[str, Any]) -> Any:
        settle()
        began = time.perf_counter()
        out = apply(told["input"], told["timestep"], **told["c"])
        settle()
        times.append(time.perf_counter() - began)
        return out

    options: dict[str, Any] = {}
    if row.weight_dtype == "fp8_e4m3fn_fast":  # as nodes.py: UNETLoader
        options = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}
    found: dict[str, Any] = {
        **told_of(row),
        "comfyui": comfyui_version.__version__,
        "versions": versions(),
        "sizes": {},
    }
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path), model_options=options)
        model.set_model_unet_function_wrapper(timed)
        text = torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(7))
        for name in row.sizes:
            frames, height, width = SIZES.get(name, TINY)
            latent = torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
            steps = STEPS + (not found["sizes"])  # the first one of all loads and compiles
            times.clear()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            prompt = [[text, {}]]
            comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", prompt, prompt, latent, seed=0)
            peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
            found["sizes"][name] = {
                "seconds": list(times),
                "step": sorted(times[-STEPS:])[STEPS // 2],
                "reserved_gib": peak,
            }
    return found | ({"errors": errors.seen} if errors.seen else {})


def told_of(row: Row) -> dict[str, Any]:
    return {"name": row.name, "exactness": row.exactness, "flags": row.flags, "weight_dtype": row.weight_dtype}


def run_apart(path: Path, row: Row) -> dict[str, Any]:
    """A row of ROWS in a process of its own; of one that ends badly, how."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        told = json.dumps(asdict(row))
        command = [sys.executable, __file__, str(path), "--out", str(out), "--row", told]
        code = subprocess.run(command, check=False).returncode
        return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {**told_of(row), "failed": code}


def chosen_rows(names: str, sizes: str = "", flags: str = "") -> list[Row]:
    """Rows by their names, with ";" between, of `sizes` with commas between where there are any.

    SystemExit where a name is not known.
    """
    wanted = [name.strip() for name in names.split(";") if name.strip()]
    if unknown := set(wanted) - {row.name for row in ROWS}:
        raise SystemExit(f"no rows {sorted(unknown)}: rows are {[row.name for row in ROWS]}")
    rows = [row for row in ROWS if not wanted or row.name in wanted]
    return [
        replace(row, sizes=tuple(sizes.split(",")) if sizes else row.sizes, flags=(*row.flags, *flags.split()))
        for row in rows
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'ComfyUI':<26}{'size':<14}{'s/step':>8}{'GiB':>7}  exactness"]
    for found in rows:
        for name, each in found.get("sizes", {}).items():
            gib = each["reserved_gib"] or 0
            lines.append(f"{found['name']:<26}{name:<14}{each['step']:>8.3f}{gib:>7.2f}  {found['exactness']}")
        if "failed" in found:
            lines.append(f"{found['name']:<26} FAILED {found['failed']}")
        lines += [f"{'':<26}{error}" for error in found.get("errors", ())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--out", type=Path, default=Path("comfyui_steps.json"))
    parser.add_argument("--rows", default="", help="only these, separated by ';'")
    parser.add_argument("--sizes", default="", help=f"of {','.join(SIZES)}; or tiny, for a CPU")
    parser.add_argument("--flags", default="", help="more of ComfyUI's, in one string: --cpu")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        options.out.write_text(json.dumps(run_row(options.path, Row(**json.loads(options.row)))), encoding="utf-8")
        return
    rows: list[dict[str, Any]] = []
    for row in chosen_rows(options.rows, options.sizes, options.flags):
        rows.append(run_apart(options.path, row))
        options.out.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
