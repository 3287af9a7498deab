"""A whole decode by the command line's path and by the decode node's, of the same random weights, in one process.

Each is measured with all of the card, where PyTorch's allocator keeps what it need not, and held to what the plan says.

    python benchmarks/decode.py --comfyui ~/ComfyUI

Run it with ComfyUI's own Python. Without --comfyui only the command line's path is measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lowvram_video.memory.plan.footprint import WorkSize, decode_memory
from lowvram_video.vae.retries import at_work
from lowvram_video.vae.tiling import WHOLE, decode_in
from lowvram_video.video.pictures import to_uint8
from lowvram_video.wanvideo.footprint import WAN21_VAE
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from measure import GIB, Watch, run_cases

DEVICE = torch.device("cuda", 0)
SIZES = ((81, 720, 1280), (81, 480, 832))


@dataclass(frozen=True)
class Case:
    path: str  # "command line" or "decode node"
    size: tuple[int, int, int]
    held: bool  # to the plan's bytes


def command_line(file: Path, latent: torch.Tensor) -> int:
    """As `WanPipeline._decode`: frames as uint8 on the CPU; how many there are."""
    opened = WAN_FORMAT.open_file(file)
    with at_work(lambda: opened.build(torch.bfloat16, DEVICE)) as vae:
        return sum(len(to_uint8(frames)) for frames in decode_in(vae, latent, WHOLE))


def decode_node(vae: Any, latent: torch.Tensor) -> int:
    """As ComfyUI runs it; the whole frame does not depend on what is free."""
    from lowvram_pack.nodes.decode import DecodeVideo

    return len(DecodeVideo.execute({"samples": latent}, vae, 0, 0, False).result[0])


def measured(decode: Callable[[torch.Tensor], int], case: Case, repeats: int) -> dict[str, Any]:
    """The best of a few decodes, after one that warms up: seconds, and what the device held at most."""
    frames, height, width = case.size
    latent = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    predicted = decode_memory(WAN21_VAE, WorkSize(frames, height, width), 16, 0, 0)
    decode(latent[:, :, :2])
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    context = total - before
    if case.held:
        torch.cuda.set_per_process_memory_fraction((predicted + torch.cuda.memory_reserved()) / total, DEVICE)
    seconds, peak, allocated = float("inf"), 0, 0
    try:
        for _ in range(repeats):
            torch.cuda.reset_peak_memory_stats()
            with Watch() as watch:
                began = time.perf_counter()
                assert decode(latent) == frames
                torch.cuda.synchronize()
                seconds = min(seconds, time.perf_counter() - began)
            peak, allocated = max(peak, before - watch.min_free), max(allocated, torch.cuda.max_memory_allocated())
            torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    return {
        "path": case.path,
        "size": case.size,
        "held_to_the_plan": case.held,
        "seconds": round(seconds, 3),
        "peak_gib": round((peak + context) / GIB, 3),
        "allocated_gib": round(allocated / GIB, 3),
        "predicted_gib": round((predicted + context) / GIB, 3),
        "context_gib": round(context / GIB, 3),
        "error_percent": round(100 * (peak - predicted) / (predicted + context), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI, for the decode node")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from end_to_end import save_vae

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = save_vae(Path(folder) / "vae.safetensors")
        paths: dict[str, Callable[[torch.Tensor], int]] = {"command line": lambda latent: command_line(file, latent)}
        if options.comfyui is not None:
            os.environ["COMFYUI_DIR"] = str(options.comfyui)
            from comfyui_nodes import start_comfyui

            start_comfyui(["--bf16-vae"])
            import comfy.sd
            import comfy.utils

            vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
            paths["decode node"] = lambda latent: decode_node(vae, latent)
        cases = [Case(path, size, held) for size in SIZES for held in (True, False) for path in paths]
        results, written = run_cases("decode", cases, lambda case: measured(paths[case.path], case, options.repeats))
    print(written)
    for result in results:
        print(
            f"{result['size']} by the {result['path']}{', held to the plan' * result['held_to_the_plan']}: "
            f"{result['seconds']:.2f} s, {result['peak_gib']:.2f} GiB, "
            f"predicted {result['predicted_gib']:.2f} ({result['error_percent']:+.1f} %)"
        )


if __name__ == "__main__":
    main()
