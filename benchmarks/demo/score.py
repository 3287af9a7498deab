"""Whether a clip shows what its caption says, by plain image moments; scores the demo model:

python -m lowvram_video.benchmarks.demo.score --num 64 [--quantization int8] [--model another_file_of_it.gguf]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lowvram_video.demo.files import DEMO_FILES, make_clip, open_demo
from lowvram_video.wanvideo.pipeline import WanPipeline
from torch import Tensor
from torch.nn import functional

from .captions import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Caption, all_captions
from .dataset import RADIUS, UNIT_AREAS, signed_distance

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]  # prompts and seeds to [N, T, H, W, 3] in 0..1

MIN_CHROMA = 0.30  # max - min of RGB; the backgrounds stay under 0.05, the palette above 0.55
MAX_COLOUR_DISTANCE = 0.35
MIN_OVERLAP = 0.70  # intersection over union; a ball against a square of equal area is 0.84
AREA_RANGE = (0.6, 1.6)  # measured area over the shape's nominal one
MIN_TRAVEL = 0.08
MAX_DRIFT = 0.35  # sideways motion over motion
DARK, LIGHT = 0.22, 0.75  # mean brightness of the background at night and in the snow


@dataclass(frozen=True)
class Verdict:
    """What was seen in a clip whose caption was `caption`; None where nothing known was recognised."""

    caption: Caption
    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    speed: str | None = None
    place: str | None = None
    area: float = 0.0  # of the object, as a fraction of the frame
    overlap: float = 0.0  # with the outline of `shape`

    def right(self, field: str) -> bool:
        """Whether `field` is as the caption says; an unnamed speed or place is always right."""
        named = getattr(self.caption, field)
        return named == "" or named == getattr(self, field)

    @property
    def all_right(self) -> bool:
        return all(self.right(field) for field in FIELDS)


FIELDS = ("colour", "shape", "direction", "speed", "place")


def judge(frames: Tensor, caption: Caption) -> Verdict:
    """Judges one clip, [T, H, W, 3] in 0..1.

    The object is what is saturated. Its shape is the known outline that overlaps it most when put at its
    centroid with its area, its motion the line through its centroids; both need it in every frame.
    """
    frames = _smooth(frames)
    chroma = frames.amax(-1) - frames.amin(-1)  # [T, H, W]
    peak = chroma.flatten(1).quantile(0.98, dim=1)
    mask = chroma > 0.5 * peak.median()
    place = _name_place(frames[~mask])
    if peak.min() < MIN_CHROMA:
        return Verdict(caption, place=place)
    area = mask.float().mean((1, 2))  # [T]
    centroid = _centroids(mask)  # [T, 2]
    shape, overlap = _name_shape(mask, centroid, area)
    direction, speed = _name_motion(centroid)
    return Verdict(
        caption,
        colour=_name_colour(frames[chroma > 0.8 * peak.median()]),
        shape=shape,
        direction=direction,
        speed=speed,
        place=place,
        area=area.mean().item(),
        overlap=overlap,
    )


def _smooth(frames: Tensor) -> Tensor:
    """Means of 3 x 3 pixels, so that single noisy ones do not count as the object. [T, H, W, C] kept."""
    channels_first = frames.permute(0, 3, 1, 2)
    padded = functional.pad(channels_first, (1, 1, 1, 1), mode="replicate")
    return functional.avg_pool2d(padded, 3, stride=1).permute(0, 2, 3, 1)


def _centroids(mask: Tensor) -> Tensor:
    """First moments of each frame: (x, y) as fractions of the width and height. [T, H, W] -> [T, 2]"""
    height, width = mask.shape[1:]
    weight = mask.float()
    total = weight.sum((1, 2)).clamp(min=1)
    x = (torch.arange(width, device=mask.device) + 0.5) / width
    y = (torch.arange(height, device=mask.device) + 0.5) / height
    return torch.stack(((weight.sum(1) @ x) / total, (weight.sum(2) @ y) / total), dim=1)


def _name_colour(pixels: Tensor) -> str | None:
    names = list(COLOURS)
    distance = (torch.tensor([COLOURS[name] for name in names]) - pixels.mean(0).cpu()).norm(dim=1)
    nearest = int(distance.argmin())
    return names[nearest] if distance[nearest] < MAX_COLOUR_DISTANCE else None


def _name_shape(mask: Tensor, centroid: Tensor, area: Tensor) -> tuple[str | None, float]:
    height, width = mask.shape[1:]
    x = (torch.arange(width, device=mask.device) + 0.5) / width - centroid[:, 0, None]
    y = (torch.arange(height, device=mask.device) + 0.5) / height - centroid[:, 1, None]
    overlaps = []
    for name in SHAPES:
        radius = (area / UNIT_AREAS[name]).sqrt()[:, None, None]
        outline = signed_distance(name, x[:, None, :], y[:, :, None], radius) < 0
        overlaps.append(((outline & mask).sum() / (outline | mask).sum()).item())
    best = max(range(len(SHAPES)), key=overlaps.__getitem__)
    size = area.mean().item() / (UNIT_AREAS[SHAPES[best]] * RADIUS**2)
    recognised = overlaps[best] >= MIN_OVERLAP and AREA_RANGE[0] < size < AREA_RANGE[1]
    return (SHAPES[best] if recognised else None), overlaps[best]


def _name_motion(centroid: Tensor) -> tuple[str | None, str | None]:
    """Direction and speed from the least-squares line through the centroids, first frame to last."""
    num_frames = centroid.shape[0]
    time_ = torch.linspace(-0.5, 0.5, num_frames, device=centroid.device)
    travel = (time_ @ centroid) / (time_ @ time_)  # [2]
    along = int(travel.abs().argmax())
    distance, drift = travel[along].abs().item(), travel[1 - along].abs().item()
    if distance < MIN_TRAVEL or drift > MAX_DRIFT * distance:
        return None, None
    step = [0, 0]
    step[along] = 1 if travel[along] > 0 else -1
    direction = next(name for name, known in DIRECTIONS.items() if list(known) == step)
    return direction, min(SPEEDS, key=lambda name: abs(SPEEDS[name] - distance))


def _name_place(pixels: Tensor) -> str:
    brightness = pixels.mean().item()
    return "at night" if brightness < DARK else "in the snow" if brightness > LIGHT else ""


def pick_captions(num: int, seed: int = 0) -> list[Caption]:
    """`num` captions in an order fixed by `seed`, each once before any comes again."""
    captions = all_captions()
    random.Random(seed).shuffle(captions)
    return [captions[index % len(captions)] for index in range(num)]


def score(generate: Generate, captions: Sequence[Caption], first_seed: int = 1000) -> list[Verdict]:
    """Generates one clip per caption, seeds counting up from `first_seed`, and judges each."""
    seeds = [first_seed + index for index in range(len(captions))]
    clips = generate([caption.text for caption in captions], seeds)
    return [judge(clip.float(), caption) for clip, caption in zip(clips, captions, strict=True)]


def make_clips(pipeline: WanPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """One clip per (prompt, seed), `[N, T, H, W, 3]` in 0 ... 1, on the CPU."""
    clips = [make_clip(pipeline, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    return torch.stack(clips).float() / 255


def table(verdicts: Sequence[Verdict]) -> str:
    """Right answers per attribute and in all, and the clips that went wrong."""
    num = len(verdicts)
    lines = [f"{'attribute':<12}{'right':>8}{'of':>6}{'%':>8}"]
    for field in FIELDS:
        named = [verdict for verdict in verdicts if getattr(verdict.caption, field)]
        right = sum(verdict.right(field) for verdict in named)
        lines.append(f"{field:<12}{right:>8}{len(named):>6}{100 * right / max(len(named), 1):>8.1f}")
    all_right = sum(verdict.all_right for verdict in verdicts)
    lines.append(f"{'everything':<12}{all_right:>8}{num:>6}{100 * all_right / max(num, 1):>8.1f}")
    for verdict in verdicts:
        if not verdict.all_right:
            seen = ", ".join(str(getattr(verdict, field)) for field in FIELDS)
            lines.append(f"  wrong: {verdict.caption.text!r} looks like {seen} (overlap {verdict.overlap:.2f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=64, help="(prompt, seed) pairs to generate")
    parser.add_argument("--model", type=Path, help="the demo model in another file, such as a GGUF of it")
    parser.add_argument("--quantization", default="none", help="as in a run: none, fp8, fp8_fast or int8")
    options = parser.parse_args()
    began = time.perf_counter()
    pipeline = open_demo(torch.device("cpu"), options.model or DEMO_FILES.model, options.quantization)
    verdicts = score(partial(make_clips, pipeline), pick_captions(options.num))
    print(table(verdicts))
    print(f"{len(verdicts)} clips in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
