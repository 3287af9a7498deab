"""A step of ComfyUI's own Wan model, as installed and with its fastest options, beside the steps of `sparse_step.py`.

    COMFYUI_DIR=~/ComfyUI python benchmarks/comfyui_steps.py /tmp/fp8.safetensors --out /tmp/comfyui_steps.json

Run it with ComfyUI's own Python. The file is Wan 14B in fp8, such as `benchmarks/synthetic.py` makes; each row is a
process of its own, in which KSampler makes three steps of each size on random prompts, without guidance. What a step
takes is from one call of the sampler's callback to the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIZES = {"480x832x81": (81, 480, 832), "720x1280x81": (81, 720, 1280)}
STEPS = 3


@dataclass(frozen=True)
class Row:
    """ComfyUI's flags and its loader's weight_dtype."""

    name: str
    exactness: str
    flags: tuple[str, ...] = ()
    weight_dtype: str = "default"


ROWS = (
    Row("as installed", "fp8 weights are cast to bf16 and multiplied so; attention in bf16"),
    Row(
        "fastest options",
        "products in fp8 of rows that are cast without scales; attention in bf16",
        ("--fast",),
        "fp8_e4m3fn_fast",
    ),
)


def run_row(path: Path, row: Row, sizes: dict[str, tuple[int, int, int]]) -> dict[str, Any]:
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
    import torch

    options: dict[str, Any] = {}
    if row.weight_dtype == "fp8_e4m3fn_fast":  # as nodes.py: UNETLoader
        options = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path), model_options=options)
        text = torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(7))
        found: dict[str, Any] = {**asdict(row), "sizes": {}}
        for name, (frames, height, width) in sizes.items():
            latent = torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
            times: list[float] = []

            def done(step: int, *_: object, times: list[float] = times) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            comfy.sample.sample(
                model,
                noise,
                STEPS + 1,
                1.0,
                "euler",
                "simple",
                [[text, {}]],
                [[text, {}]],
                latent,
                callback=done,
                seed=0,
            )
            seconds = [after - before for before, after in itertools.pairwise(times)]
            peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
            found["sizes"][name] = {
                "seconds": seconds,
                "step": sorted(seconds)[len(seconds) // 2],
                "reserved_gib": peak,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--out", type=Path, default=Path("comfyui_steps.json"))
    parser.add_argument("--flags", default="", help="more of ComfyUI's, in one string: --cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {"32x32x5": (5, 32, 32)} if options.tiny else SIZES
    if options.row is not None:
        row = ROWS[options.row]
        row = Row(row.name, row.exactness, (*row.flags, *options.flags.split()), row.weight_dtype)
        options.out.write_text(json.dumps(run_row(options.path, row, sizes)), encoding="utf-8")
        return
    results = []
    for index, row in enumerate(ROWS):
        part = options.out.with_name(f"{options.out.stem}_{index}.json")
        part.unlink(missing_ok=True)
        command = [sys.executable, __file__, str(options.path), "--out", str(part), "--row", str(index)]
        command += [f"--flags={options.flags}", *(["--tiny"] if options.tiny else [])]
        code = subprocess.run(command, check=False).returncode
        results.append(
            json.loads(part.read_text(encoding="utf-8")) if part.exists() else {"name": row.name, "failed": code}
        )
        options.out.write_text(json.dumps({"rows": results}, indent=1), encoding="utf-8")
    print(f"{'ComfyUI':<18}{'size':<14}{'s/step':>8}{'GiB':>7}  exactness")
    for found in results:
        for name, each in found.get("sizes", {}).items():
            gib = each["reserved_gib"] or 0
            print(f"{found['name']:<18}{name:<14}{each['step']:>8.3f}{gib:>7.2f}  {found['exactness']}")
        if "failed" in found:
            print(f"{found['name']:<18} FAILED {found['failed']}")


if __name__ == "__main__":
    main()
