"""What `random_draws.py` draws: a model's file, how it is run, and in how much VRAM."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowvram_video.benchmarks.synthetic import CONFIGS
from lowvram_video.memory.plan.footprint import GIB, WorkSize
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.config import WanConfig

TINY = {
    name: replace(config, dim=128 * heads, ffn_dim=256 * heads, num_heads=heads, num_layers=layers, text_dim=64)
    for (name, config), heads, layers in zip(
        ((name, CONFIGS[name]) for name in ("1.3b", "14b", "5b")), (2, 4, 3), (3, 4, 3), strict=True
    )
    if isinstance(config, WanConfig)
}


@dataclass(frozen=True)
class Way:
    """A file and how it is run; `share` of the draws are of it. `anew`: opened and read within each draw's budget."""

    model: str
    stored: str
    quantizations: tuple[str, ...]
    share: float
    lora_share: float
    most_tokens: int
    anew: bool = False

    @property
    def file(self) -> str:
        return f"{self.model}_{self.stored}"


WAYS = (
    Way("14b", "fp8", ("none", "fp8_fast"), 0.27, 0.3, 20_000),
    Way("14b", "Q4_K", ("none",), 0.3, 0.3, 20_000),
    Way("1.3b", "bf16", ("none", "fp8", "fp8_fast", "int8"), 0.33, 0.3, 33_000, anew=True),
    Way("5b", "bf16", ("none",), 0.1, 0.3, 20_000),
)


@dataclass(frozen=True)
class Draw:
    """What is drawn. `quantization` of a 1.3B file is made while it is read, of others it says how they multiply."""

    file: str
    quantization: str
    lora: bool
    frames: int
    height: int
    width: int
    attention: str
    budget_gib: float

    def __str__(self) -> str:
        lora = " +LoRA" if self.lora else ""
        size = f"{self.width}x{self.height}x{self.frames}"
        return f"{self.file} {self.quantization}{lora} {size} {self.attention}"


@dataclass(frozen=True)
class Sizes:
    """Sizes that are drawn, from the smallest to the largest: latent frames, sides in pixels, tokens."""

    latent_frames: tuple[int, int] = (4, 21)
    side: tuple[int, int] = (240, 1280)
    least_tokens: int = 2_000


TINY_SIZES = Sizes((2, 3), (64, 128), 8)


def make_draws(
    seed: int, count: int, attentions: tuple[str, ...], configs: Mapping[str, WanConfig], sizes: Sizes
) -> list[Draw]:
    """So many draws, those of one file together; no part of the planner has a say in them."""
    rng = random.Random(seed)
    shares = [way.share for way in WAYS]
    draws = [_draw(rng, way, attentions, configs[way.model], sizes) for way in rng.choices(WAYS, shares, k=count)]
    return sorted(draws, key=lambda draw: (draw.file, draw.lora))


def _draw(rng: random.Random, way: Way, attentions: tuple[str, ...], config: WanConfig, sizes: Sizes) -> Draw:
    unit = wan_work(config, (64, 64, 5)).size_unit
    while True:
        frames = 4 * rng.randint(*sizes.latent_frames) - 3
        height, width = (unit * rng.randint(*(side // unit for side in sizes.side)) for _ in range(2))
        work = wan_work(config, (width, height, frames))
        if sizes.least_tokens <= work.tokens <= way.most_tokens:
            break
    quantization = rng.choice(way.quantizations)
    stored = {"bf16": 2.0, "fp8": 1.0, "Q4_K": 0.5625}[way.stored]
    if way.anew and quantization != "none":
        stored = 1.0
    attention = rng.choice(attentions)
    least, weights = _roughly(config, work, stored)
    # some are too small, most hold a part of the blocks, some all of them
    budget = least * rng.uniform(0.85, 1.0) if rng.random() < 0.15 else least + weights * rng.uniform(0, 1.1) ** 1.5
    lora = rng.random() < way.lora_share
    return Draw(way.file, quantization, lora, frames, height, width, attention, round(budget / GIB, 2))


def _roughly(config: WanConfig, work: WorkSize, stored: float) -> tuple[float, float]:
    """Bytes that a draw needs with all blocks streamed, and bytes of all blocks."""
    block = stored * (8 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    activations = 2 * work.rows * config.dim * 4.5 + 8 * config.dim**2
    return 0.8 * GIB + 2 * block + activations, config.num_layers * block
