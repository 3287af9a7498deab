"""FlashVSR in VRAM that is really limited, with random weights of full size: seconds a frame, and memory by length.

    python benchmarks/upscale.py --out results.json --public ~/FlashVSR

832x480 becomes 1664x960. A second process holds the rest of the card, so that context and fragmentation count. Memory
is measured for videos of 45 and of 405 frames. With --public, a checkout of OpenImagingLab/FlashVSR, its own pipeline
runs beside, in all of the card: its block-sparse kernel where `block_sparse_attn` is installed, else dense attention on
both sides (PyTorch's). --tiny tries all of it on a CPU, in small sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from lowvram_video.attention.masked_select import select_masked
from lowvram_video.memory.plan.limits import hold_allocator
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.vae.tiny import TinyVAE
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.upscale.decoder import CONDITIONAL
from lowvram_video.wanvideo.upscale.projection import LowQualityProjection, ProjectionConfig
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest
from lowvram_video.wanvideo.upscale.run import Upscaler
from measure import GIB, Ballast, Watch, bench_device, machine
from synthetic import CONFIGS, write_checkpoint, write_random
from torch import Tensor, nn

TINY = WanConfig("t2v", 256, 256, 2, 2)


@dataclass(frozen=True)
class Case:
    """`gib` of VRAM, 0: all of it."""

    num_frames: int
    gib: float
    scale: int = 2
    sparse_ratio: float = 2.0
    quantization: str = "none"


CASES = (
    Case(121, 6),
    Case(121, 0),
    Case(121, 0, sparse_ratio=0.0),
    Case(45, 6),
    Case(405, 6),
    Case(45, 6, scale=4),
)


def write_files(folder: Path, tiny: bool, device: torch.device) -> UpscaleFiles:
    """Random files in bf16."""
    config = TINY if tiny else CONFIGS["1.3b"]
    assert isinstance(config, WanConfig)
    widths = (16, 16, 16, 16) if tiny else CONDITIONAL.widths
    projection = ProjectionConfig((32, 32) if tiny else (2048, 3072), config.dim)
    files = UpscaleFiles(*(folder / f"{name}.safetensors" for name in ("model", "projection", "decoder", "prompt")))
    write_checkpoint(files.model, config, "bf16", device.type)
    for path, module in (
        (files.projection, LowQualityProjection(projection, "meta")),
        (files.decoder, TinyVAE(replace(CONDITIONAL, widths=widths), "meta")),
    ):
        write_random(
            path, {name: (tuple(each.shape), "bf16") for name, each in module.state_dict().items()}, device.type
        )
    write_random(files.prompt, {"context": ((1, 512, config.text_dim), "bf16")}, device.type)
    return files


def small_frames(num_frames: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Noise, a frame at a time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_frames):
        yield torch.randint(0, 256, (1, size[1], size[0], 3), generator=generator, dtype=torch.uint8)


def run(files: UpscaleFiles, case: Case, size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """One video; the first two windows are for warming up."""
    settings = RunSettings(device=device, vram_budget_gib=case.gib or None, quantization=case.quantization)
    upscaler = Upscaler(files, settings)
    request = UpscaleRequest(case.scale, sparse_ratio=case.sparse_ratio)
    before, times, counts = psutil.Process().memory_info().rss, [], []
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    watch: Any = Watch() if device.type == "cuda" else NoWatch()
    with watch:
        for frames in upscaler.frames(small_frames(case.num_frames, size), request, size):
            times.append(time.perf_counter())
            counts.append(len(frames))
    hold_if(device)
    timed = slice(2, None) if len(times) > 3 else slice(1, None)
    seconds = (times[-1] - times[timed][0]) / max(1, sum(counts[timed][1:]))
    plan = upscaler.plan
    assert plan is not None
    return {
        **asdict(case),
        "seconds_per_frame": seconds,
        "vram_gib": (free - watch.min_free) / GIB,
        "planned_gib": plan.denoise.total / GIB,
        "rss_gib": (watch.rss_peak - before) / GIB,
        "streamed_blocks": plan.blocks.num_streamed,
        "attention": upscaler.model.model.execution.attention.name,
        "sparse_kernel": kernel_of(upscaler, device),
    }


def kernel_of(upscaler: Upscaler, device: torch.device) -> str:
    return select_masked(device, upscaler.settings.compute_dtype, upscaler.model.config.head_dim).name


def hold_if(device: torch.device) -> None:
    if device.type == "cuda":
        hold_allocator(device, None)
        torch.cuda.empty_cache()


class NoWatch:
    """Of a CPU."""

    min_free = 0

    def __enter__(self) -> NoWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.rss_peak = psutil.Process().memory_info().rss


# --- the public code ------------------------------------------------------------------------------------------


def public_pipeline(root: Path, files: UpscaleFiles, device: torch.device, tiny: bool) -> tuple[Any, str]:
    """Their pipeline with our weights, and the name of its attention."""
    kernel = import_public(root)
    from public.models.wan_video_dit import WanModel
    from public.pipelines.flashvsr_tiny import FlashVSRTinyPipeline
    from safetensors.torch import load_file

    folder = root / "examples/WanVSR/utils"
    tools, decoders = (load(f"public_{name}", folder / f"{name}.py") for name in ("utils", "TCDecoder"))
    config = TINY if tiny else CONFIGS["1.3b"]
    assert isinstance(config, WanConfig)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = FlashVSRTinyPipeline(device=str(device), torch_dtype=dtype)
    pipe.dit = WanModel(
        config.dim, 16, config.ffn_dim, 16, config.text_dim, config.freq_dim, config.eps, (1, 2, 2), config.num_heads,
        config.num_layers,
    )  # fmt: skip
    pipe.dit.load_state_dict(load_file(files.model))
    weights = load_file(files.projection)
    projection = tools.Buffer_LQ4x_Proj(3, config.dim, 1)
    if tiny:  # the published widths are in its constructor
        first, second = weights["conv1.weight"].shape[0], weights["conv2.weight"].shape[0]
        how: dict[str, Any] = {"stride": (2, 1, 1), "padding": (1, 1, 1)}
        projection.conv1 = tools.CausalConv3d(768, first, (4, 3, 3), **how)
        projection.conv2 = tools.CausalConv3d(first, second, (4, 3, 3), **how)
        projection.norm1, projection.norm2 = tools.RMS_norm(first, images=False), tools.RMS_norm(second, images=False)
        projection.linear_layers = nn.ModuleList([nn.Linear(second, config.dim)])
    projection.load_state_dict(weights)
    projection.clear_cache()
    stored = load_file(files.decoder)
    widths = [stored[f"decoder.{index}.weight"].shape[0] for index in (1, 10, 16, 22)]
    pipe.TCDecoder = decoders.build_tcdecoder(widths, str(device), dtype, 784)
    pipe.TCDecoder.load_state_dict(stored)
    pipe.dit.LQ_proj_in = projection
    pipe.dit.to(device, dtype)
    pipe.init_cross_kv(load_file(files.prompt)["context"].to(device, dtype))
    return pipe, kernel


def import_public(root: Path) -> str:
    """Make their model and pipeline importable without the rest of their package; the attention that they get."""
    if importlib.util.find_spec("block_sparse_attn") is None:
        dense = types.ModuleType("block_sparse_attn")
        dense.block_sparse_attn_func = _dense  # type: ignore[attr-defined]
        sys.modules["block_sparse_attn"] = dense
        kernel = "dense (PyTorch)"
    else:
        kernel = "block_sparse_attn"
    for name in ("", ".models", ".pipelines", ".schedulers"):
        module = types.ModuleType(f"public{name}")
        module.__path__ = [str(root / "diffsynth" / name.removeprefix("."))]
        sys.modules[module.__name__] = module
    for name, needed in (
        ("models.utils", ("hash_state_dict_keys",)),
        ("models.wan_video_vae", ("WanVideoVAE", "RMS_norm", "CausalConv3d", "Upsample")),
    ):
        stub = types.ModuleType(f"public.{name}")
        vars(stub).update(dict.fromkeys(needed, object))
        sys.modules[stub.__name__] = stub
    vars(sys.modules["public.models"])["ModelManager"] = object
    base = types.ModuleType("public.pipelines.base")
    vars(base)["BasePipeline"] = _BasePipeline
    sys.modules[base.__name__] = base
    return kernel


class _BasePipeline(nn.Module):
    """What their pipeline takes of its base."""

    def __init__(self, device: str, torch_dtype: torch.dtype) -> None:
        super().__init__()
        self.device, self.torch_dtype = device, torch_dtype

    def check_resize_height_width(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def load_models_to_device(self, names: list[str]) -> None:
        pass

    def generate_noise(self, shape: tuple[int, ...], seed: int, device: str, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)


def _dense(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def run_public(
    root: Path, files: UpscaleFiles, num_frames: int, size: tuple[int, int], device: torch.device, tiny: bool
) -> dict[str, Any]:
    """Their pipeline on as many frames, in the size that ours pads to; the second run is timed."""
    pipe, kernel = public_pipeline(root, files, device, tiny)
    width, height = (-(-2 * side // 128) * 128 for side in size)
    count = num_frames + 4
    shown = torch.rand(1, 3, count, height, width, device=device).to(pipe.torch_dtype) * 2 - 1
    ratio = 2.0 * 768 * 1280 / (height * width)
    seconds = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        frames = pipe(
            cfg_scale=1.0, num_frames=count, height=height, width=width, LQ_video=shown, if_buffer=True,
            topk_ratio=ratio, kv_ratio=3.0, local_range=11, seed=0,
        )  # fmt: skip
        frames.float().sum().item()
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_reserved() / GIB if device.type == "cuda" else 0.0
    return {"seconds_per_frame": seconds / frames.shape[1], "vram_gib": peak, "attention": kernel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--public", type=Path, help="a checkout of OpenImagingLab/FlashVSR")
    parser.add_argument("--folder", type=Path, help="for the files of random weights (4 GB)")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    options = parser.parse_args()
    device, size = bench_device(), ((128, 64) if options.tiny else (832, 480))
    results: dict[str, Any] = {"machine": machine(), "size": size, "cases": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        files = write_files(Path(folder), options.tiny, device)
        for case in CASES:
            case = replace(case, num_frames=min(case.num_frames, 29)) if options.tiny else case
            if device.type == "cuda" and case.gib:
                with Ballast(case.gib):
                    results["cases"].append(run(files, case, size, device))
            else:
                results["cases"].append(run(files, case, size, device))
            options.out.write_text(json.dumps(results, indent=1))
        if options.public is not None:
            count = 29 if options.tiny else 117  # theirs are 8n - 3
            results["public"] = run_public(options.public, files, count, size, device, options.tiny)
            options.out.write_text(json.dumps(results, indent=1))
    print("frames  scale  GiB given  sparse  s/frame  VRAM GiB  planned  RSS GiB  kernel")
    for each in results["cases"]:
        print(
            f"{each['num_frames']:6} {each['scale']:6} {each['gib'] or 'all':>10} {each['sparse_ratio']:7} "
            f"{each['seconds_per_frame']:8.3f} {each['vram_gib']:9.2f} {each['planned_gib']:8.2f} "
            f"{each['rss_gib']:8.2f}  {each['sparse_kernel'] if each['sparse_ratio'] else each['attention']}"
        )
    if "public" in results:
        said = results["public"]
        print(f"public code: {said['seconds_per_frame']:.3f} s/frame, {said['vram_gib']:.2f} GiB, {said['attention']}")


if __name__ == "__main__":
    main()
