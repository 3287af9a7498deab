"""The nodes inside a real ComfyUI, on its GPU: speed, the budget, and what is left after each run.

    COMFYUI_DIR=~/ComfyUI python benchmarks/comfyui_nodes.py /tmp/14b_fp8.safetensors /tmp/1.3b_fp8.safetensors

Run it with ComfyUI's own Python. KSampler runs on random prompts; two models take turns; one run is interrupted.
"""

from __future__ import annotations

import argparse
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

PACK = Path(__file__).parents[1]
GIB = 2**30


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """PyAV where it is not installed: any module, any name."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "av":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = mock.MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        return


def start_comfyui(flags: list[str]) -> None:
    """Import ComfyUI and the pack as ComfyUI does, without the server."""
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    sys.argv = ["main.py", *flags]
    if importlib.util.find_spec("av") is None:  # only for writing files, which nothing here does
        sys.meta_path.append(StandIn())
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    if not hasattr(comfy.model_patcher, "CoreModelPatcher"):  # main.py sets it
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcher
    spec = importlib.util.spec_from_file_location(
        "lowvram_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lowvram_pack"] = module
    spec.loader.exec_module(module)


class Runs:
    """KSampler on our MODELs, with what it cost."""

    def __init__(self, device: Any):
        import torch

        self.torch, self.device = torch, device
        self.text = torch.randn(2, 512, 4096, generator=torch.Generator().manual_seed(7))

    def load(self, path: Path, budget: float, **options: Any) -> Any:
        import folder_paths
        from lowvram_pack.nodes.block_swap import BlockSwap
        from lowvram_pack.nodes.loaders import LoadWanModel

        folder_paths.add_model_folder_path("diffusion_models", str(path.parent))
        model = LoadWanModel.execute(path.name, "auto", "auto", "none").result[0]
        settings = {"blocks_to_swap": -1, "vram_budget_gb": budget, "prefetch": 0, "ram_budget_gb": 0.0}
        settings |= {"pinned_memory": True, "pass_other_models": False} | options
        return BlockSwap.execute(model, **settings).result[0]

    def sample(self, model: Any, frames: int, height: int, width: int, steps: int, cfg: float = 1.0) -> float:
        """Seconds of a whole KSampler run."""
        import nodes

        positive, negative = [[self.text[:1], {}]], [[self.text[1:], {}]]
        size = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        began = time.perf_counter()
        latent = {"samples": self.torch.zeros(size)}
        out = nodes.common_ksampler(model, 5, steps, cfg, "euler", "simple", positive, negative, latent)[0]["samples"]
        seconds = time.perf_counter() - began
        assert self.torch.isfinite(out).all()
        return seconds

    def left(self, model: Any) -> str:
        """VRAM used on the device, RSS and pinned bytes now."""
        import psutil

        pinned = model.model.diffusion_model.engine.streamed.pinned_bytes
        used = 0
        if self.device.type == "cuda":
            free, total = self.torch.cuda.mem_get_info()
            used = total - free
        return f"VRAM {used / GIB:.3f} RSS {psutil.Process().memory_info().rss / GIB:.3f} pinned {pinned / GIB:.3f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("large", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--vram-budget", type=float, default=6.0)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 832))
    parser.add_argument("--flags", default="", help='of ComfyUI, in one string: "--cpu --reserve-vram 1"')
    options = parser.parse_args()
    start_comfyui(options.flags.split())
    import comfy.model_management as mm
    import torch

    with torch.inference_mode():
        runs = Runs(mm.get_torch_device())
        large = runs.load(options.large, options.vram_budget)
        small = runs.load(options.small, options.vram_budget)
        print("at start:", runs.left(large))
        for name, cfg in (("CFG 1", 1.0), ("CFG 5", 5.0)):
            first = runs.sample(large, options.frames, *options.size, 1, cfg)
            three = runs.sample(large, options.frames, *options.size, 3, cfg)
            print(f"large, {name}: first run of 1 step {first:.2f} s, then {three / 3:.3f} s/step;", runs.left(large))
            report = large.model.diffusion_model.engine.report
            print(report.table() if report else "no report")
        for turn in range(10):
            model = (large, small)[turn % 2]
            seconds = runs.sample(model, 17, *options.size, 2)
            print(f"turn {turn}: {seconds:.2f} s;", runs.left(model))
        timer = threading.Timer(0.6, mm.interrupt_current_processing)
        timer.start()
        try:
            runs.sample(large, options.frames, *options.size, 3)
            print("interrupt: NOT INTERRUPTED")
        except mm.InterruptProcessingException:
            print("interrupted;", runs.left(large))
        timer.cancel()
        print(f"again after the interrupt: {runs.sample(large, 17, *options.size, 2):.2f} s")
        mm.unload_all_models()
        gc.collect()
        mm.soft_empty_cache()
        print("all unloaded:", runs.left(large))


if __name__ == "__main__":
    main()
