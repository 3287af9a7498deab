"""Whole decodes and encodes by the Wan 2.1 VAE in VRAM that is really limited, by every path, with random weights.

    python benchmarks/decode.py --comfyui ~/ComfyUI --out results.json

Run it with ComfyUI's own Python. A second process holds the rest of the card, so that context and fragmentation count.
The command line's path and the decode node's make the same frames, whose largest difference from whole frames is in
`levels` of 255; ComfyUI's own VAE Decode stands beside them. Without --comfyui only the command line's is measured.
`rss_mib` is RAM above the process before, in which frames of this benchmark wait too: `frames_mib`. `planned_gib` is
beside what PyTorch reserved: neither counts the context. Memory is watched in every other run, the first among them, as
to ask the driver every 3 ms takes time of its own. LOWVRAM_RECORD_STEPS=0 and PYTORCH_CUDA_ALLOC_CONF count for
all paths alike, and are in the results.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lowvram_video.fused.frame_ops import EagerFrameOps
from lowvram_video.fused.frame_select import difference, select_frame_ops
from lowvram_video.memory.plan.decode import DecodeMemory, choose_decode
from lowvram_video.memory.plan.footprint import Limits, WorkSize
from lowvram_video.memory.plan.limits import hold_allocator, hold_budget
from lowvram_video.memory.stream.pinned import CudaRegistrar
from lowvram_video.system.device_errors import is_out_of_memory
from lowvram_video.vae.recording import select_recorder
from lowvram_video.vae.retries import at_work, pieces_fitting
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import Tile, Way, decode_in, encode_fitting, retry_ways
from lowvram_video.video.pictures import to_levels, to_uint8
from lowvram_video.wanvideo.footprint import WAN21_ENCODER, WAN21_VAE
from lowvram_video.wanvideo.vae import coding
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from measure import GIB, Ballast, Watch, machine
from torch import Tensor

RESERVE = 256 << 20  # as `memory/plan/limits.py` keeps
P720, P480, LONG = (81, 720, 1280), (81, 480, 832), (161, 720, 1280)


@dataclass(frozen=True)
class Case:
    path: str  # "command line", "decode node", "ComfyUI", "encode" or "ComfyUI encodes"
    size: tuple[int, int, int]
    gib: float  # that this process may use, 0: all

    def __str__(self) -> str:
        frames, height, _ = self.size
        within = f"within {self.gib:g} GiB" if self.gib else "with all VRAM"
        return f"{self.path}: {frames} frames of {height}p {within}"


CASES = (
    Case("command line", P720, 0),
    Case("command line", P720, 3),
    Case("command line", P720, 2),
    Case("command line", P480, 0),
    Case("command line", P480, 2),
    Case("command line", LONG, 3),
    Case("encode", P720, 0),
    Case("encode", P720, 3),
    Case("decode node", P720, 0),
    Case("decode node", P720, 3),
    Case("ComfyUI", P720, 0),
    Case("ComfyUI", P720, 3),
    Case("ComfyUI", P480, 0),
    Case("ComfyUI", P480, 2),
    Case("ComfyUI encodes", P720, 0),
    Case("ComfyUI encodes", P720, 3),
)


class Bench:
    """The paths, on one file of random weights; results of whole frames are what others are compared with."""

    def __init__(self, file: Path, device: torch.device, repeats: int, scale: int) -> None:
        self.opened, self.device = WAN_FORMAT.open_file(file), device
        self.repeats, self.scale = repeats, scale
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.whole: dict[tuple[bool, tuple[int, int, int]], Tensor] = {}
        self.given = torch.empty(0)  # what a case codes, which is there before it is timed
        self.way, self.planned = "", 0
        self.built = self.made = 0.0
        self.native: Any = None

    def size(self, case: Case) -> tuple[int, int, int]:
        frames, height, width = case.size
        return frames if self.scale == 1 else 5, height // self.scale // 8 * 8, width // self.scale // 8 * 8

    def native_latent(self, case: Case) -> Tensor:
        """As ComfyUI has it."""
        frames, height, width = self.size(case)
        generator = torch.Generator().manual_seed(0)
        mean, std = self.statistics
        latent = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
        return latent * std + mean

    def latent(self, case: Case) -> Tensor:
        """The normalised latent, by the same arithmetic as the node's, so that its bits are the same."""
        mean, std = self.statistics
        return (self.native_latent(case) - mean) / std

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        config = self.opened.config
        return tuple(torch.tensor(each).view(1, -1, 1, 1, 1) for each in (config.latent_mean, config.latent_std))

    def video(self, case: Case) -> Tensor:
        frames, height, width = self.size(case)
        values = torch.rand(1, 3, frames, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.interpolate(values[0], scale_factor=8)[None].mul_(2).sub_(1).half()

    def images(self, case: Case) -> Tensor:
        return self.video(case)[0].movedim(0, -1).float().add_(1).div_(2)

    def limits(self) -> Limits:
        if self.device.type != "cuda":
            return Limits(1 << 60, context_bytes=0)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        limits = Limits(0)
        return Limits(min(total, free + limits.context_bytes) - RESERVE)

    def ways(self, vae: Any, planned: DecodeMemory, size: tuple[int, int, int]) -> list[Way]:
        registrar = CudaRegistrar(self.device) if self.device.type == "cuda" else None
        way: Way = Strips(planned.rows, planned.in_ram, registrar) if planned.rows else Tile(planned.tile)
        self.way = f"{way} ({planned.total / GIB:.2f} GiB planned)"
        self.planned = planned.total - Limits(0).context_bytes if self.device.type == "cuda" else planned.total
        return [way, *retry_ways(vae, way, size[1:], registrar)]

    def command_line(self, case: Case) -> list[Tensor]:
        """As `WanPipeline._decode`: pieces that a file would be written of."""
        size = self.size(case)
        limits = self.limits()
        hold_budget(self.device, limits)
        planned = choose_decode(WAN21_VAE, WorkSize(*size), 16, limits)
        assert planned is not None
        latent = self.given
        with at_work(lambda: self.opened.build(self.dtype, self.device, "decoder")) as vae:
            self.built = time.perf_counter()

            def frames(way: Way) -> Iterator[Tensor]:
                return map(to_uint8, decode_in(vae, latent, way, None, to_levels))

            pieces = list(pieces_fitting(self.ways(vae, planned, size), frames, "decoding"))
            self.made = time.perf_counter()
        return pieces

    def encode(self, case: Case) -> Tensor:
        size, limits = self.size(case), self.limits()
        hold_budget(self.device, limits)
        planned = choose_decode(WAN21_ENCODER, WorkSize(*size), 16, limits)
        assert planned is not None
        with at_work(lambda: self.opened.build(self.dtype, self.device, "encoder")) as vae:
            first, *_ = self.ways(vae, planned, size)
            registrar = first.registrar if isinstance(first, Strips) else None
            return encode_fitting(vae, self.given, first, registrar=registrar)

    def decode_node(self, case: Case) -> Tensor:
        from lowvram_pack.nodes.decode import DecodeVideo

        self.hold_nothing()
        latent = self.given
        self.planned = self.opened.weight_bytes(self.dtype, "decoder") + self.planned_bytes(latent)
        images: Tensor = DecodeVideo.execute({"samples": latent}, self.native, 0, 0, False).result[0]
        return images

    def hold_nothing(self) -> None:
        if self.device.type == "cuda":
            hold_allocator(self.device, None)

    def planned_bytes(self, latent: Tensor) -> int:
        """Of whole frames, as the node plans them."""
        from lowvram_pack.nodes.bridge.coding_ways import coding_bytes

        return int(coding_bytes(self.opened.config, self.dtype, latent, 0))

    def comfyui(self, case: Case) -> Tensor:
        self.hold_nothing()
        images: Tensor = self.native.decode(self.given)[0]
        return images

    def comfyui_encodes(self, case: Case) -> Tensor:
        self.hold_nothing()
        return self.native.encode(self.given)

    def run(self, case: Case) -> dict[str, Any]:
        """The best of a few, after one that warms up where all VRAM is there."""
        work: dict[str, tuple[Callable[[Case], Tensor], Callable[[Case], Tensor | list[Tensor]]]] = {
            "command line": (self.latent, self.command_line), "encode": (self.video, self.encode),
            "decode node": (self.native_latent, self.decode_node), "ComfyUI": (self.native_latent, self.comfyui),
            "ComfyUI encodes": (self.images, self.comfyui_encodes),
        }  # fmt: skip
        give, code = work[case.path]
        self.given = give(case)
        row: dict[str, Any] = {**asdict(case), "seconds": []}
        self.way, self.planned = "", 0
        for repeat in range(self.repeats):
            gc.collect()
            watched = self.device.type == "cuda" and repeat % 2 == 0
            before = psutil.Process().memory_info().rss
            with Watch() if watched else NoWatch() as watch:
                began = time.perf_counter()
                try:
                    result = code(case)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    return {**row, "error": "out of memory"}
                row["seconds"].append(round(time.perf_counter() - began, 3))
                if case.path == "command line":
                    row["parts"] = [round(self.built - began, 3), round(self.made - self.built, 3)]
            if watched:
                row |= {"rss_mib": (watch.rss_peak - before) >> 20, "least_free_mib": watch.min_free >> 20}
            if self.device.type == "cuda":
                row |= {"allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
                        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3)}  # fmt: skip
                torch.cuda.reset_peak_memory_stats()
        if isinstance(result, list):
            result = torch.cat(result)
        row |= {"best": min(row["seconds"]), "way": self.way, "frames_mib": result.nbytes >> 20}
        if self.planned and not (case.path == "decode node" and case.gib):
            row["planned_gib"] = round(self.planned / GIB, 3)
        if case.path in ("decode node", "ComfyUI"):
            result = result.mul(255).round_().to(torch.uint8)
        return row | self.compared(case, result)

    def compared(self, case: Case, result: Tensor) -> dict[str, Any]:
        """How far a result is from that of whole frames, which the first of its kind gives."""
        key = "encode" in case.path, case.size
        if "ComfyUI" in case.path or (case.gib and key not in self.whole):
            return {}
        whole = self.whole.setdefault(key, result)
        difference = (result.float() - whole.float()).abs() if key[0] else None
        if difference is not None:
            return {"latent_error": round(float(difference.max()), 5), "latent_std": round(float(whole.std()), 3)}
        levels = [int((a.int() - b.int()).abs().max()) for a, b in zip(result, whole, strict=True)]
        others = sum(int((a != b).sum()) for a, b in zip(result, whole, strict=True))
        return {"levels": max(levels), "others_percent": round(100 * others / whole.numel(), 4)}


class NoWatch:
    """Of a run that is timed alone."""

    min_free = rss_peak = 0

    def __enter__(self) -> NoWatch:
        return self

    def __exit__(self, *_: object) -> None:
        return


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Say which steps run between convolutions; where no kernel gives PyTorch's bits, measure one all the same."""
    print("steps between convolutions:", select_frame_ops(device, dtype).name, flush=True)
    if device.type == "cuda" and select_frame_ops(device, dtype).name == "eager":
        from lowvram_video.fused.frame_kernels import ORDERS, TritonFrameOps

        for order in ORDERS:
            print(order, difference(TritonFrameOps(order), EagerFrameOps(), device, dtype), flush=True)
        coding.select_frame_ops = lambda device, dtype: TritonFrameOps()
        print("MEASURED WITH KERNELS THAT WERE REFUSED", flush=True)


def profile(bench: Bench) -> None:
    """Where a decode's time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    case = Case("command line", (25, *P720[1:]), 0)
    bench.given = bench.latent(case)
    bench.command_line(case)
    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        bench.command_line(case)
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI, for the decode node and ComfyUI's own decoder")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="cases whose line has one of these: 'command line' '480p within 2'")
    parser.add_argument("--profile", action="store_true", help="say where the time of 25 frames goes, first")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with small pictures")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    from end_to_end import save_vae

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = save_vae(Path(folder) / "vae.safetensors", torch.bfloat16)  # as the released file
        with Ballast(0) if not options.tiny else NoWatch() as ballast:
            device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
            bench = Bench(file, device, options.repeats, 16 if options.tiny else 1)
            check_kernels(device, bench.dtype)
            print(settings(device), flush=True)
            if options.profile:
                profile(bench)
            if options.comfyui is not None:
                bench.native = start(options.comfyui, file, ["--cpu"] if options.tiny else [])
            for case in CASES:
                if options.only and not any(words in str(case) for words in options.only):
                    continue
                if options.comfyui is None and case.path not in ("command line", "encode"):
                    continue
                if isinstance(ballast, Ballast):
                    torch.cuda.empty_cache()
                    ballast.leave(case.gib)
                rows.append(bench.run(case))
                print(json.dumps(rows[-1]), flush=True)
                if options.out is not None:
                    found = {"machine": machine() | settings(device), "cases": rows}
                    options.out.write_text(json.dumps(found, indent=1))
    for row in rows:
        frames, height, width = row["size"]
        best, room = row.get("best", row.get("error")), row["gib"] or "all"
        print(f"{row['path']}, {width}x{height}x{frames} in {room}: {best} s, {row.get('reserved_gib')} GiB reserved of"
              f" {row.get('planned_gib')} planned, RAM +{row.get('rss_mib')} MiB, levels {row.get('levels')}, "
              f"{row.get('way')}")  # fmt: skip


def settings(device: torch.device) -> dict[str, Any]:
    """What PyTorch's memory is from, and whether strips are recorded."""
    allocator = torch.cuda.get_allocator_backend() if device.type == "cuda" else None
    return {"allocator": allocator, "recorded": select_recorder(device) is not None}


def start(comfyui: Path, file: Path, flags: list[str]) -> Any:
    """ComfyUI's VAE of the file."""
    os.environ["COMFYUI_DIR"] = str(comfyui)
    from comfyui_nodes import start_comfyui

    start_comfyui(["--bf16-vae", *flags])
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))


if __name__ == "__main__":
    main()
