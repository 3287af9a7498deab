"""What decoding by Wan 2.1's VAE costs in whole frames and in strips, counted from its layers without a GPU.

    python benchmarks/decode_counts.py --size 1280 720 81

`calls` are the operations that Python hands to the device; `TFLOP` are the convolutions', `GB` what these and the steps
between them read and write, `borders` what moves between strips, there and back. `seconds` are those of an assumed card
of 550 TFLOP/s, 2.9 TB/s, 55 GB/s each way beside the work, and 45 us a call (of Python's).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from lowvram_video.memory.plan.tiles import strip_rows
from lowvram_video.vae.strips import aligned
from lowvram_video.wanvideo.vae.coding import Decoding, page_elements
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WanVAE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TFLOPS, TBPS, LINK_GBPS, CALL_SECONDS = 550.0, 2.9, 55.0, 45e-6
VIEWS = ("view", "permute", "slice", "chunk", "split", "select", "expand", "unbind", "alias", "empty", "detach", "t")


@dataclass
class Counts(TorchDispatchMode):
    """Operations on meta tensors."""

    calls: int = 0
    flops: float = 0.0
    moved: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if not name.startswith(VIEWS) and isinstance(result, Tensor):
            self.add(*(each for each in args if isinstance(each, Tensor)), result)
            if "conv" in name:
                self.flops += 2.0 * result.numel() * args[1][0].numel()
        return result

    def add(self, *tensors: Tensor) -> None:
        """A call that reads or writes tensors."""
        self.calls += 1
        self.moved += sum(each.numel() * each.element_size() for each in tensors)


class CountedOps:
    """The fused steps between convolutions."""

    name = "counted"

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def norm_silu(self, x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor) -> None:
        self._counts.add(x, out)

    def add_(self, x: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None) -> None:
        self._counts.add(x, other, x)


class Page:
    """Where a step leaves rows, on the meta device."""

    def __init__(self, like: Tensor, num_elements: int) -> None:
        self._memory, self._used = like.new_empty(num_elements), 0

    def begin(self) -> None:
        self._used = 0

    def slot(self, num_elements: int) -> Tensor:
        slot = self._memory[self._used : self._used + num_elements]
        self._used += aligned(num_elements)
        return slot


def counted(decoding: Decoding, rows: int | None) -> dict[str, float]:
    """The layers in strips of so many rows: what all steps of all strips cost, each as its second step."""
    counts = Counts()
    decoding._ops = CountedOps(counts)
    plan, needed = decoding.plan(rows)
    elements = page_elements(plan, decoding.batch)
    page = Page(decoding.weight, elements)
    for index, strip in enumerate(decoding.strips(plan, page if rows else None)):  # type: ignore[arg-type]
        height = needed.ends[index] - needed.begins[index]
        features = decoding.weight.new_empty(1, decoding.weight.shape[0], height, decoding.width)
        for step in range(2):
            page.begin()
            before = counts.calls, counts.flops, counts.moved
            with counts:
                decoding.piece(features, strip)
            if step == 0:
                counts.calls, counts.flops, counts.moved = before
    steps = decoding.num_latents - 1 + 1 / decoding.side.frames_per_latent
    borders = 2 * 2 * elements * (plan.num_strips - 1) * steps
    return {"strips": plan.num_strips, "calls": counts.calls * steps, "tflop": counts.flops * steps / 1e12,
            "gb": counts.moved * steps / 1e9, "borders_gb": borders / 1e9}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=(1280, 720, 81), metavar=("WIDTH", "HEIGHT", "FRAMES"))
    width, height, frames = parser.parse_args().size
    vae = WanVAE(WAN21_VAE, device="meta", dtype=torch.bfloat16)
    print(f"{width}x{height}x{frames}: strips rows  calls  TFLOP     GB  borders | seconds: products memory link calls")
    with torch.inference_mode():
        for rows in (None, *strip_rows(height)[:8]):
            decoding = vae.decoding((1, 16, (frames - 1) // 4 + 1, height // 8, width // 8))
            decoding._channels_last = True
            found = counted(decoding, rows)
            between = found["gb"] / TBPS / 1e3
            print(f"{found['strips']:6.0f} {rows or height:5d} {found['calls']:7.0f} {found['tflop']:6.0f} "
                  f"{found['gb']:6.0f} {found['borders_gb']:8.1f} | {found['tflop'] / TFLOPS:8.2f} {between:6.2f} "
                  f"{found['borders_gb'] / 2 / LINK_GBPS:6.2f} {found['calls'] * CALL_SECONDS:5.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
