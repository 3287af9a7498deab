"""What a step of the Wan VAE's decoder is made of on a GPU: convolutions whole and in strips, copies, recorded steps.

    python benchmarks/decode_parts.py --out results.json

`equal` says whether a convolution of some rows has the bits of the whole frame's, which is a matter of the kernels that
cuDNN takes for each height. `different` are numbers that recorded strips have and strips by calls have not: none is
right. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from demo.captions import Caption
from demo.dataset import ClipSize, draw_scenes, render_clips
from lowvram_video.demo.files import DEMO_FILES
from lowvram_video.framepack.vae.model import HunyuanVAE
from lowvram_video.framepack.vae.model import VAEConfig as HunyuanConfig
from lowvram_video.memory.stream.pinned import CudaRegistrar
from lowvram_video.system.host_memory import allocate_extent
from lowvram_video.vae.files import to_channels_last
from lowvram_video.vae.layouts import lies_channels_last
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import Tile, decode_tiled
from lowvram_video.video.pictures import to_levels
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.wanvideo.vae.heights import Kind, agreeing_rows, find_heights
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WanVAE
from lowvram_video.wanvideo.vae.resampling import enlarge
from torch import Tensor, nn

# in (of three frames), out, rows and columns at 720x1280, padding to the sides
CONVOLUTIONS = (
    (288, 96, 720, 1280, 3), (192, 96, 720, 1280, 3), (576, 192, 360, 640, 3), (384, 192, 360, 640, 3),
    (576, 384, 180, 320, 3), (1152, 384, 180, 320, 3), (1152, 384, 90, 160, 3), (1152, 768, 180, 320, 1),
    (288, 3, 720, 1280, 3), (384, 192, 180, 320, 3), (1152, 768, 90, 160, 1), (192, 384, 180, 320, 1),
)  # fmt: skip
STRIPS = (((720, 1280), 144), ((720, 1280), 48), ((480, 832), 96), ((480, 832), 160))  # pictures, rows of a strip
STEPS = (((480, 832), 80, 21), ((480, 832), 96, 21), ((720, 1280), 120, 21))  # pictures, rows of a strip, latents
V = TypeVar("V", bound=nn.Module)
SHARES = (2, 3, 4, 5, 6)  # of a frame's rows


class Parts:
    def __init__(self, device: torch.device, scale: int) -> None:
        self.device, self.scale = device, scale
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rows: list[dict[str, Any]] = []

    def note(self, **row: Any) -> None:
        self.rows.append(row)
        print(row, flush=True)

    def rand(self, *shape: int) -> Tensor:
        made = torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)
        return made.contiguous(memory_format=torch.channels_last)

    def seconds(self, work: Callable[[], object], repeats: int = 8) -> float:
        work()
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - began) / repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def kernels(self, work: Callable[[], object]) -> str:
        if self.device.type != "cuda":
            return ""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            work()
            self.wait()
        return "; ".join(sorted({each.key[:110] for each in found.key_averages()} - {"cudaDeviceSynchronize"}))

    def convolutions(self) -> None:
        """Each of a whole frame, and of the rows that strips of it have, one more and one less."""
        for inward, outward, height, width, kernel in CONVOLUTIONS:
            height, width = height // self.scale, width // self.scale
            edge = kernel // 2
            x = self.rand(1, inward, height + 2 * edge, width)
            weight = (self.rand(outward, inward, kernel, kernel) / inward**0.5).contiguous(
                memory_format=torch.channels_last)  # fmt: skip

            def convolve(first: int, count: int) -> Tensor:
                return F.conv2d(x[:, :, first : first + count + 2 * edge], weight, padding=(0, edge))  # noqa: B023

            whole = convolve(0, height)
            what = f"{inward}->{outward} {height}x{width} {kernel}x{kernel}"
            self.note(what=what, rows=height, ms=1e3 * self.seconds(lambda: convolve(0, height)),  # noqa: B023
                      kernels=self.kernels(lambda: convolve(0, height)))  # noqa: B023  # fmt: skip
            for share in SHARES:
                for more in (0, 1, -2):
                    rows = max(1, height // share + more)
                    first = (height - rows) // 2
                    part = convolve(first, rows)
                    different = int((part != whole[:, :, first : first + rows]).sum())
                    row = {"what": what, "rows": rows, "equal": not different, "different": different / part.numel()}
                    if not more:
                        each = self.seconds(lambda: convolve(first, rows))  # noqa: B023
                        row |= {"ms_of_all_rows": 1e3 * each * height / rows,
                                "kernels": self.kernels(lambda: convolve(first, rows))}  # noqa: B023  # fmt: skip
                    self.note(**row)

    def heights(self) -> None:
        """Which convolutions of real strips have the bits of whole frames, as high as they are and as they are made.

        Those too that no decode tries, as they are large. `made` are heights other than needed, null where one has
        none. What a decode's search takes, the first time, is told.
        """
        vae = self.vae()
        for size, rows in STRIPS:
            height, width = (-(-side // (8 * self.scale)) for side in size)
            coding = vae.decoding((1, 16, 3, height, width))
            plan, _ = coding.plan(max(8, rows // self.scale // 8 * 8))
            what = f"{size[1]}x{size[0]} in strips of {rows} rows"
            self.wait()
            began = time.perf_counter()
            find_heights(plan, 1, coding.weight, lies_channels_last(coding.weight))
            self.note(what=what, s=round(time.perf_counter() - began, 3))
            different = {each: layer for layer, each in plan.convolutions.items()}
            for convolution, layer in different.items():
                kind = Kind(convolution, 1, self.dtype, self.device, lies_channels_last(coding.weight))
                made = plan.layers[layer]
                found = agreeing_rows(kind, made.outputs.height, made.counts_out)
                other = None if found is None else {a: b for a, b in zip(made.counts_out, found, strict=True) if a != b}
                self.note(what=what, convolution=str(convolution), of=made.outputs.height, made=other)

    def copies(self) -> None:
        for channels, height, width in ((192, 360, 640), (384, 180, 320)):
            height, width = height // self.scale, width // self.scale
            x, out = self.rand(1, channels, height, width), self.rand(1, channels, 2 * height + 2, 2 * width)
            each = self.seconds(lambda: enlarge(x, 1, out))  # noqa: B023
            self.note(what=f"enlarge {channels} {height}x{width}", ms=1e3 * each, gbps=5 * x.nbytes / each / 1e9)

    def pinning(self) -> None:
        """A page of rows in RAM for 81 frames, one at a time and all at once."""
        if self.device.type != "cuda":
            return
        registrar = CudaRegistrar(self.device)
        for count, nbytes in ((21, 36 << 20), (1, 756 << 20)):
            began = time.perf_counter()
            extents = [allocate_extent(nbytes) for _ in range(count)]
            pinned = [registrar.pin(extent) for extent in extents]
            middle = time.perf_counter()
            for extent in extents:
                registrar.unpin(extent)
            self.note(what=f"pin {count} x {nbytes >> 20} MiB", s=middle - began, pinned=all(pinned),
                      unpin_s=time.perf_counter() - middle)  # fmt: skip

    def steps(self) -> None:
        """Strips by calls and as recorded: whether they are the same, and what they take, recorded twice."""
        vae = self.vae()
        for size, rows, latents in STEPS:
            case, pieces = (size, rows, latents if self.scale == 1 else 3), None
            for recorded in (False, True, True):
                os.environ["LOWVRAM_RECORD_STEPS"] = str(int(recorded))
                row, made = self._strips(vae, *case)
                pieces = pieces or made
                differ = sum(int((one != other).sum()) for one, other in zip(made, pieces, strict=True))
                self.note(**row, recorded=recorded, different=differ)
        os.environ.pop("LOWVRAM_RECORD_STEPS")

    def levels(self) -> None:
        """What strips change, beside what other kernels for the same whole frames and what 16 bits change, of 255."""
        torch.backends.cudnn.allow_tf32 = False
        height, width = 720 // self.scale // 8 * 8, 1280 // self.scale // 8 * 8
        random = torch.randn(1, 16, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
        for what, trained in (("random weights", False), ("the demo's trained weights", True)):
            vae, latent = self.vae(torch.float32, trained), random
            if trained:
                latent = self._drawn_latent(vae, height, width)
            exact = self._whole(vae, latent)
            vae = self.vae(self.dtype, trained)
            want = self._whole(vae, latent)
            others = {"fp32": exact, "whole once more": self._whole(vae, latent)}
            torch.backends.cudnn.benchmark = True
            others["whole by timed kernels"] = self._whole(vae, latent)
            torch.backends.cudnn.benchmark = False
            for rows in (144, 96, 48):
                way = Strips(max(8, rows // self.scale // 8 * 8))
                others[str(way)] = torch.cat(list(vae.decode_strips(latent, way, to_levels)), 2)
            for name, other in others.items():
                difference = (other.int() - want.int()).abs()
                bands = [round(100 * float(part.float().mean()), 2) for part in (difference > 0).chunk(15, 3)]
                self.note(what=what, beside=name, levels=int(difference.max()),
                          others_percent=round(100 * float((difference > 0).float().mean()), 4),
                          more_than_one_percent=round(100 * float((difference > 1).float().mean()), 4),
                          others_by_rows=bands, deviation=round(float(want.float().std()), 1))  # fmt: skip

    def _whole(self, vae: WanVAE, latent: Tensor) -> Tensor:
        return torch.cat([to_levels(piece).cpu() for piece in vae.decode_pieces(latent)], 2)

    def _drawn_latent(self, vae: WanVAE, height: int, width: int) -> Tensor:
        """Of the demo's clips side by side, in 9 frames of any size."""
        scenes = draw_scenes([Caption("red", "ball", "right", "", "in the snow")], torch.Generator().manual_seed(2))
        clip = render_clips(scenes, ClipSize(9)) * 2 - 1
        rows, columns = -(-height // clip.shape[3]), -(-width // clip.shape[4])
        return vae.encode(clip.repeat(1, 1, 1, rows, columns)[..., :height, :width]).float().cpu()

    def tiles(self) -> None:
        """What tiles change by HunyuanVideo's VAE, whose norms and attention see all of a clip, of its deviation."""
        torch.manual_seed(0)
        vae = self._with_random_weights(HunyuanVAE(HunyuanConfig(), device=self.device, dtype=self.dtype))
        latents, height, width = (18, 608, 640) if self.scale == 1 else (2, 32, 32)
        for positions in (3, 12):
            size = latents, height // 8, width // 8
            coarse = torch.randn(1, 16, latents, *(-(-side // positions) for side in size[1:]))
            latent = F.interpolate(coarse, size=size, mode="trilinear")
            whole = torch.cat([piece.float().cpu() for piece in vae.decode_pieces(latent)], 2)
            for tile in (Tile(512), Tile(256), Tile(256, 16)):
                if tile.pixels // self.scale < 16:
                    continue
                difference = decode_tiled(vae, latent, tile).float() - whole
                self.note(what=f"HunyuanVideo's VAE {tile}", smooth_over=positions,
                          mean_difference=round(float(difference.abs().mean() / whole.std()), 3))  # fmt: skip

    def profile(self) -> None:
        """Strips by calls: which take what of the device and of Python."""
        from torch.profiler import ProfilerActivity, profile

        os.environ["LOWVRAM_RECORD_STEPS"] = "0"
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            self._strips(self.vae(), (480, 832), 96, 4)
        print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=100))
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=60))
        os.environ.pop("LOWVRAM_RECORD_STEPS")

    def _strips(
        self, vae: WanVAE, size: tuple[int, int], rows: int, latents: int
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """One decode in strips, as eight-bit levels: `until` says when each strip's steps had been asked for."""
        height, width = (-(-side // (8 * self.scale)) for side in size)
        latent = torch.randn(1, 16, latents, height, width, generator=torch.Generator().manual_seed(0))
        registrar = CudaRegistrar(self.device) if self.device.type == "cuda" else None
        way, marks = Strips(max(8, rows // self.scale // 8 * 8), True, registrar), [0.0]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        began = time.perf_counter()
        pieces = list(
            vae.decode_strips(latent, way, to_levels, None, lambda *_: marks.append(time.perf_counter() - began))
        )
        self.wait()
        ended = time.perf_counter() - began
        gaps = sorted(1e3 * (b - a) for a, b in pairwise(marks))
        row = {"what": f"{latents} latents of {size[1]}x{size[0]} {way}", "s": round(ended, 4),
               "ms_between": [round(gaps[int(share * (len(gaps) - 1))], 2) for share in (0, 0.1, 0.5, 0.9, 1)],
               "until": [round(each, 3) for each in marks[1::latents]]}  # fmt: skip
        if self.device.type == "cuda":
            row |= {"allocated": round(torch.cuda.max_memory_allocated() / 2**30, 3),
                    "reserved": round(torch.cuda.max_memory_reserved() / 2**30, 3)}  # fmt: skip
        return row, pieces

    def vae(self, dtype: torch.dtype | None = None, trained: bool = False) -> WanVAE:
        """Of the released dimensions, with random weights, or the demo's."""
        if trained:
            return WAN_FORMAT.open_file(DEMO_FILES.vae).build(dtype or self.dtype, self.device)
        torch.manual_seed(0)
        return self._with_random_weights(WanVAE(WAN21_VAE, device=self.device, dtype=dtype or self.dtype))

    def _with_random_weights(self, vae: V) -> V:
        for parameter in vae.parameters():
            values = torch.randn(parameter.shape, device=self.device)
            parameter.copy_(values * (parameter[0].numel() if parameter.ndim > 1 else 1) ** -0.5)
        if self.device.type == "cuda":
            vae.load_state_dict({name: to_channels_last(each) for name, each in vae.state_dict().items()}, assign=True)
        return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--only", nargs="*", help="what to measure")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with small pictures")
    options = parser.parse_args()
    logging.basicConfig()
    logging.getLogger("lowvram_video.wanvideo.vae.heights").setLevel(logging.DEBUG)
    parts = Parts(torch.device("cpu") if options.tiny else torch.device("cuda", 0), 30 if options.tiny else 1)
    with torch.inference_mode():
        for work in (
            parts.steps,
            parts.heights,
            parts.levels,
            parts.tiles,
            parts.profile,
            parts.copies,
            parts.pinning,
            parts.convolutions,
        ):
            if options.only and work.__name__ not in options.only:
                continue
            began = time.perf_counter()
            try:
                work()
            except RuntimeError:  # what was measured is kept, and the error with it
                parts.note(what=work.__name__, error=traceback.format_exc()[-3000:])
            print(work.__name__, f"took {time.perf_counter() - began:.1f} s", flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(parts.rows, indent=1))
    for row in parts.rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
