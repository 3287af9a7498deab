"""FlashVSR in VRAM that is really limited, with random weights of full size: seconds a frame, and memory by length.

    python benchmarks/upscale.py --out results.json --public ~/FlashVSR

832x480 becomes 1664x960, and once 3328x1920. A second process holds the rest of the card, so that context and
fragmentation count. Memory by length is that of one video of 405 frames from file to file, after 45, 121 and all of
them. With --public, a checkout of OpenImagingLab/FlashVSR, its own pipeline runs beside, in all of the card: with its
block-sparse kernel where `block_sparse_attn` is installed, else with dense attention, which ours is then measured with
too. What fails is told, and the rest is measured. --tiny tries all of it on a CPU, in small sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import allocator  # noqa: F401  first: torch reads what it sets
import psutil
import torch
from lowvram_video.attention.masked_select import select_masked
from lowvram_video.memory.plan.limits import hold_allocator
from lowvram_video.runtime.progress import Progress
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.vae.tiny import TinyVAE
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.upscale.decoder import CONDITIONAL
from lowvram_video.wanvideo.upscale.film import FilmPlace, UpscaleFilm
from lowvram_video.wanvideo.upscale.projection import LowQualityProjection, ProjectionConfig
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest, padded
from lowvram_video.wanvideo.upscale.run import Upscaler
from lowvram_video.wanvideo.upscale.source import VideoFile
from measure import GIB, Ballast, Watch, bench_device, machine
from public_flashvsr import import_public
from synthetic import CONFIGS, write_checkpoint, write_random
from torch import Tensor

TINY = WanConfig("t2v", 256, 256, 2, 2)


@dataclass(frozen=True)
class Case:
    """`gib` of VRAM, 0: all of it. `file_to_file`: by way of video files, with readings of memory on the way."""

    num_frames: int
    gib: float
    scale: int = 2
    sparse_ratio: float = 2.0
    file_to_file: bool = False


LIMITED = (
    Case(121, 6),
    Case(121, 6, sparse_ratio=0.0),
    Case(29, 6, scale=4),
    Case(405, 6, file_to_file=True),
)
UNLIMITED = (Case(121, 0), Case(121, 0, sparse_ratio=0.0))
READINGS = (45, 121, 405)
PUBLIC_FRAMES = 117  # theirs are 8n - 3
RATE = 24.0


@dataclass
class Bench:
    """What the cases share, and what they found."""

    options: argparse.Namespace
    device: torch.device
    files: UpscaleFiles
    results: dict[str, Any]
    began: float = field(default_factory=time.perf_counter)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the small video."""
        return (128, 64) if self.options.tiny else (832, 480)

    @property
    def config(self) -> WanConfig:
        config = TINY if self.options.tiny else CONFIGS["1.3b"]
        assert isinstance(config, WanConfig)
        return config

    def attempt(self, where: str, case: Case | None) -> None:
        """Measure a case, ours or (None) the public code, and write down what came of it, or what went wrong."""
        told = asdict(case) if case else {}
        if time.perf_counter() - self.began > self.options.seconds:
            self._note(where, {**told, "error": f"left out after {self.options.seconds:g} s"})
            return
        hold_if(self.device)  # what files were written with, or the last case had, is no part of this one
        began = time.perf_counter()
        try:
            found = run_public(self) if case is None else run(self, case)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other cases are measured
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:400]}
        self._note(where, {**told, **found, "took_seconds": time.perf_counter() - began})

    def _note(self, where: str, found: dict[str, Any]) -> None:
        self.results.setdefault(where, []).append(found)
        self.options.out.write_text(json.dumps(self.results, indent=1))
        print(where, found, flush=True)
        hold_if(self.device)


def write_files(folder: Path, config: WanConfig, tiny: bool, device: torch.device) -> UpscaleFiles:
    """Random files in bf16."""
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
    """Colours that move, a frame at a time, uint8 `[1, h, w, 3]`."""
    across, down = (torch.arange(side, dtype=torch.float32) for side in size)
    for number in range(num_frames):
        waves = [
            (across[None] / (20 + 7 * part) + down[:, None] / (31 - 5 * part) + number / (4 + part)).sin()
            for part in range(3)
        ]
        yield torch.stack(waves, -1).mul_(127).add_(128).byte()[None]


# --- ours -----------------------------------------------------------------------------------------------------


def run(bench: Bench, case: Case) -> dict[str, Any]:
    """One video; the first two windows are for warming up."""
    settings = RunSettings(device=bench.device, vram_budget_gib=case.gib or None)
    upscaler = Upscaler(bench.files, settings)
    request = UpscaleRequest(case.scale, sparse_ratio=case.sparse_ratio)
    before = psutil.Process().memory_info().rss
    free = torch.cuda.mem_get_info(bench.device)[0] if bench.device.type == "cuda" else 0
    watch: Any = Watch() if bench.device.type == "cuda" else NoWatch()
    marks = Marks(watch, free, before)
    with watch:
        if case.file_to_file:
            through_files(bench, case.num_frames, upscaler, request, marks)
        else:
            marks.update(0, 0)
            num_made = 0
            for frames in upscaler.frames(small_frames(case.num_frames, bench.size), request, bench.size):
                num_made += len(frames)
                marks.update(num_made, 0)
    plan = upscaler.plan
    assert plan is not None
    return {
        "seconds_per_frame": marks.seconds_per_frame(),
        "vram_gib": (free - watch.min_free) / GIB,
        "planned_gib": plan.denoise.total / GIB,
        "rss_gib": (watch.rss_peak - before) / GIB,
        "readings": marks.readings,
        "streamed_blocks": plan.blocks.num_streamed,
        "decoder_in_ram": upscaler.model.parks_memory,
        "attention": upscaler.model.model.execution.attention.name,
        "sparse_kernel": select_masked(bench.device, settings.compute_dtype, upscaler.model.config.head_dim).name,
    }


def through_files(bench: Bench, num_frames: int, upscaler: Upscaler, request: UpscaleRequest, marks: Marks) -> None:
    """A video file made larger into another."""
    with tempfile.TemporaryDirectory(dir=bench.options.folder) as name:
        small = Path(name) / "small.mp4"
        with VideoWriter(small, RATE, crf=28) as writer:
            for frames in small_frames(num_frames, bench.size):
                writer.write(frames)
        UpscaleFilm(upscaler, VideoFile(small), request, marks).make(FilmPlace(Path(name) / "large.mp4"))


class Marks(Progress):
    """When how many frames were there, and the most of memory until then."""

    def __init__(self, watch: Any, free: int, rss: int) -> None:
        self._watch, self._free, self._rss = watch, free, rss
        self._times: list[tuple[int, float]] = []
        self.readings: list[dict[str, Any]] = []

    def update(self, done: int, total: int) -> None:
        self._times.append((done, time.perf_counter()))
        wanted = [count for count in READINGS if count <= done]
        if len(wanted) > len(self.readings):
            vram, rss = (self._free - self._watch.min_free) / GIB, (self._watch.rss_peak - self._rss) / GIB
            self.readings.append({"frames": wanted[-1], "vram_gib": vram, "rss_gib": rss})

    def seconds_per_frame(self) -> float:
        """After the first two windows, where there are more than these."""
        first = self._times[3] if len(self._times) > 4 else self._times[1]
        last = self._times[-1]
        return (last[1] - first[1]) / max(1, last[0] - first[0])


def hold_if(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        hold_allocator(device, None)
        torch.cuda.empty_cache()


class NoWatch:
    """Of a CPU."""

    min_free, rss_peak = 0, 0

    def __enter__(self) -> NoWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.rss_peak = psutil.Process().memory_info().rss


# --- the public code ------------------------------------------------------------------------------------------


@torch.inference_mode()
def run_public(bench: Bench) -> dict[str, Any]:
    """Their pipeline, in the size that ours pads to; a shorter video has warmed it up."""
    device, cuda = bench.device, bench.device.type == "cuda"
    public = import_public(bench.options.public)
    dtype = torch.bfloat16 if cuda else torch.float32
    pipe = public.whole(bench.files, bench.config, device, dtype)
    width, height = padded(UpscaleRequest(2).size(*bench.size))
    seconds, made = 0.0, 0
    for num_frames in (29, 29 if bench.options.tiny else PUBLIC_FRAMES):
        count = num_frames + 4
        shown = torch.rand(1, 3, count, height, width, device=device).to(dtype) * 2 - 1
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        frames = pipe(
            cfg_scale=1.0, num_frames=count, height=height, width=width, LQ_video=shown, if_buffer=True,
            topk_ratio=2.0 * 768 * 1280 / (height * width), kv_ratio=3.0, local_range=11, seed=0,
        )  # fmt: skip
        frames.float().sum().item()
        seconds, made = time.perf_counter() - began, frames.shape[1]
    peak = torch.cuda.max_memory_reserved() / GIB if cuda else 0.0
    return {"num_frames": made, "seconds_per_frame": seconds / made, "vram_gib": peak, "attention": public.attention}


# --- both -----------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    print("frames  scale  GiB given  sparse  s/frame  VRAM GiB  planned  RSS GiB  kernel")
    for each in results.get("cases", []):
        beginning = f"{each['num_frames']:6} {each['scale']:6} {each['gib'] or 'all':>10} {each['sparse_ratio']:7}"
        if "error" in each:
            print(f"{beginning}  {each['error']}")
            continue
        print(
            f"{beginning} {each['seconds_per_frame']:8.3f} {each['vram_gib']:9.2f} {each['planned_gib']:8.2f} "
            f"{each['rss_gib']:8.2f}  {each['sparse_kernel'] if each['sparse_ratio'] else each['attention']}"
            f"{', from file to file' if each['file_to_file'] else ''}"
        )
        for reading in each["readings"] if each["file_to_file"] else ():
            print(
                f"    after {reading['frames']} frames: {reading['vram_gib']:.2f} GiB of VRAM, "
                f"{reading['rss_gib']:.2f} GiB of RAM"
            )
    for said in results.get("public", []):
        if "error" in said:
            print(f"public code: {said['error']}")
            continue
        print(
            f"public code, {said['num_frames']} frames: {said['seconds_per_frame']:.3f} s/frame, "
            f"{said['vram_gib']:.2f} GiB, {said['attention']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--public", type=Path, help="a checkout of OpenImagingLab/FlashVSR")
    parser.add_argument("--folder", type=Path, help="for the files of random weights (4 GB)")
    parser.add_argument("--seconds", type=float, default=3600, help="after so many no further case begins")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    options = parser.parse_args()
    device = bench_device()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, device, UpscaleFiles(*[Path(folder)] * 4), {"machine": machine()})
        bench.results["size"] = bench.size
        bench.files = write_files(Path(folder), bench.config, options.tiny, device)
        bench.results["writing_seconds"] = time.perf_counter() - bench.began
        hold_if(device)  # the ballast leaves what is given beside what this process has by then
        given = max(case.gib for case in LIMITED)
        with Ballast(given) if device.type == "cuda" else nullcontext():
            for case in LIMITED:
                bench.attempt("cases", _shortened(case) if options.tiny else case)
        if options.public is not None:
            bench.attempt("public", None)
        for case in () if options.tiny else UNLIMITED[::-1]:
            bench.attempt("cases", case)
        bench.results["all_seconds"] = time.perf_counter() - bench.began
        options.out.write_text(json.dumps(bench.results, indent=1))
    show(bench.results)


def _shortened(case: Case) -> Case:
    return replace(case, num_frames=min(case.num_frames, 45 if case.file_to_file else 29))


if __name__ == "__main__":
    main()
