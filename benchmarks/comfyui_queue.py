"""A real ComfyUI server under queued prompts: its memory in turns, interrupts, evictions, and under its own flags.

    python benchmarks/comfyui_queue.py --comfyui ~/ComfyUI --result benchmarks/results/comfyui_queue.json

Run it with a Python that has this pack (`pip install -e .`). It writes two random Wan checkpoints, starts ComfyUI's
main.py with the pack in its custom_nodes, and asks it over HTTP alone; text comes from the tests' stand-in node. A
scenario that fails is noted with the end of the server's log, and the next one starts with a new server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from lowvram_video.system.atomic_files import write_file
from measure import GIB, machine
from queue_scenarios import SCENARIOS, Record, run_scenario
from queue_server import ON_GPU, SIZES, TINY, Bench, Size
from synthetic import write_checkpoint

PACK = Path(__file__).parents[1]
STAND_INS = PACK / "tests" / "comfyui" / "stand_ins"
NOT_COPIED = shutil.ignore_patterns(".*", "output", "build", "tests", "__pycache__", "*.egg-info")

# a custom node pack without nodes: what only the server's process knows
PROBE = """
import comfy.model_management as mm
import torch
from aiohttp import web
from comfy_execution.progress import get_progress_state
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/bench/state")
async def state(_):
    progress = get_progress_state()
    on_gpu = mm.get_torch_device().type == "cuda"
    patchers = [loaded.model for loaded in mm.current_loaded_models]
    return web.json_response({
        "pinned_bytes": int(mm.TOTAL_PINNED_MEMORY),
        "allocated_bytes": torch.cuda.memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.memory_reserved() if on_gpu else 0,
        "loaded": [[type(one).__name__, int(one.loaded_size())] for one in patchers if one is not None],
        "node": PromptServer.instance.last_node_id,
        "progress": {"prompt": progress.prompt_id, **{name: node["value"] for name, node in progress.nodes.items()}},
    })
"""


def make_base(base: Path) -> None:
    """The server's folders, this pack and the stand-ins among its custom nodes."""
    nodes = base / "custom_nodes"
    for folder in (nodes / "bench_probe", base / "models" / "diffusion_models", base / "frontend"):
        folder.mkdir(parents=True, exist_ok=True)
    (nodes / "bench_probe" / "__init__.py").write_text(PROBE, encoding="utf-8")
    (base / "frontend" / "index.html").write_text("no frontend", encoding="utf-8")
    for target, name in ((PACK, "ComfyUI-LowVRAM-Video"), (STAND_INS, "stand_ins")):
        if (nodes / name).exists():
            continue
        try:
            (nodes / name).symlink_to(target.resolve(), target_is_directory=True)
        except OSError:  # Windows without developer mode
            shutil.copytree(target, nodes / name, ignore=NOT_COPIED)


def warm_up(base: Path) -> None:
    """Have all kernels that `write_models` needs on the device, so that this program's VRAM does not grow later."""
    if ON_GPU:
        for dtype in ("fp8", "bf16"):
            write_checkpoint(base / "warm_up.part", TINY, dtype, "cuda")
        (base / "warm_up.part").unlink()
        torch.cuda.empty_cache()


def write_models(base: Path, size: Size) -> None:
    """The two checkpoints, unless they are there."""
    device = "cuda" if ON_GPU else "cpu"
    for model in (size.large, size.small):
        path = base / "models" / "diffusion_models" / model.file
        if path.exists():
            continue
        began, part = time.monotonic(), path.with_suffix(".part")
        nbytes = write_checkpoint(part, model.config, model.dtype, device)
        part.rename(path)
        print(f"{model.file}: {nbytes / GIB:.2f} GiB in {time.monotonic() - began:.0f} s", flush=True)
    if ON_GPU:
        torch.cuda.empty_cache()


def print_record(name: str, record: Record) -> None:
    """A scenario's line, and those of its rows, checks and trouble."""
    speed = record.figures.get("seconds_per_step")
    peak = record.figures.get("peak_bytes")
    line = f"{name:<24}{record.verdict:<9}{record.seconds:>7.1f} s"
    line += f"  {speed:.3f} s/step" if speed is not None else ""
    line += f"  peak {peak / GIB:.3f} GiB" if peak is not None else ""
    print(line + (f"  {record.skipped}" if record.skipped else ""))
    for row in record.figures.get("rows", []):
        label = f"{row.get('workflow', row.get('model'))} {row['turn']}"
        memory = (
            f"{kind} {(row[key] or 0) / GIB:.3f}"
            for kind, key in (("peak", "peak_bytes"), ("VRAM", "vram_bytes"), ("RSS", "rss_bytes"),
                              ("pinned", "pinned_bytes"))
        )  # fmt: skip
        print(f"    {label:<10}{row['seconds']:>8.2f} s  {'  '.join(memory)} GiB")
    for check in record.checks:
        print(f"    {'ok' if check['passed'] else 'NOT':<4}{check['check']}: {check['figure']}")
    if record.error:
        print(f"    {record.error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--python", type=Path, help="ComfyUI's Python; its venv, or this one where it has none")
    parser.add_argument("--size", choices=list(SIZES), default="full" if ON_GPU else "small")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="of them, separated by commas")
    parser.add_argument("--flags", default="" if ON_GPU else "--cpu", help="of ComfyUI, for every scenario")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all of it; what comes later is skipped")
    parser.add_argument("--work", type=Path, help="a folder that is kept, with the checkpoints (default: temporary)")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    unknown = set(options.scenarios.split(",")) - set(SCENARIOS)
    if unknown:
        parser.error(f"unknown scenarios {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    if not (options.comfyui / "main.py").is_file():
        parser.error(f"{options.comfyui} has no main.py: give ComfyUI's folder")
    return options


def find_python(comfyui: Path) -> Path:
    names = ("bin/python", "Scripts/python.exe")
    found = (comfyui / venv / name for venv in ("venv", ".venv") for name in names)
    return next((path for path in found if path.exists()), Path(sys.executable))


def main() -> None:
    options, began = parse_options(), time.monotonic()
    size = SIZES[options.size]
    folder = contextlib.nullcontext(options.work) if options.work else tempfile.TemporaryDirectory()
    with folder as name:
        base = Path(name).resolve()
        make_base(base)
        warm_up(base)
        comfyui = options.comfyui.resolve()
        python = options.python or find_python(comfyui)
        bench = Bench(size, comfyui, python.absolute(), base, tuple(shlex.split(options.flags)))
        results = {
            "machine": machine(), "size": options.size, "sizes": asdict(size), "flags": options.flags,
            "comfyui": (comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2],
        }  # fmt: skip
        records: dict[str, Record] = {}
        try:
            names = options.scenarios.split(",")
            if not SCENARIOS[names[0]].own_server:
                bench.launch()  # it starts while the checkpoints are written
            write_models(base, size)
            for name in names:
                records[name] = run_scenario(bench, name, options.seconds - (time.monotonic() - began))
                print_record(name, records[name])
                sys.stdout.flush()
                found = {key: asdict(record) | {"verdict": record.verdict} for key, record in records.items()}
                results |= {"servers": bench.servers, "seconds": time.monotonic() - began, "scenarios": found}
                write_file(options.result, json.dumps(results, indent=1).encode())
        finally:
            bench.stop()
    print(f"\n{'scenario':<24}{'verdict':<9}{'seconds':>8}{'s/step':>9}{'peak GiB':>10}{'pinned GiB':>12}")
    for name, record in records.items():
        speed, peak, pinned = (record.figures.get(key) for key in ("seconds_per_step", "peak_bytes", "pinned_bytes"))
        cells = (_cell(speed, 1), _cell(peak, GIB), _cell(pinned, GIB))
        print(f"{name:<24}{record.verdict:<9}{record.seconds:>8.1f}{cells[0]:>9}{cells[1]:>10}{cells[2]:>12}")
    print(f"{time.monotonic() - began:.0f} s in all; {options.result}")


def _cell(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3f}"


if __name__ == "__main__":
    main()
