"""A Wan 14B of some of its 40 blocks, in files of random weights, and passes of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.memory.plan.limits import Limits, limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.lora.file import LoraChoice
from synthetic import CONFIGS, write_checkpoint, write_gguf, write_lora
from torch import Tensor

GIB = 2**30
VRAM_GIB = 16  # of plans
WEIGHTS = {"fp8": "fp8.safetensors", "Q4_K": "q4_k.gguf"}
LORA = "lora32.safetensors"
TINY = WanConfig("t2v", 256, 512, 2, 3, text_dim=32, freq_dim=32)
TINY_SIZES = ((128, 96, 5), (128, 112, 5))  # width, height, frames


@dataclass(frozen=True)
class Bench:
    """Where files are, and of what."""

    folder: Path
    blocks: int
    on_gpu: bool

    @property
    def config(self) -> WanConfig:
        config = CONFIGS["14b"] if self.on_gpu else TINY
        assert isinstance(config, WanConfig)
        return replace(config, num_layers=self.blocks)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    def size(self, on_gpu: tuple[int, int, int], tiny: int = 0) -> tuple[int, int, int]:
        return on_gpu if self.on_gpu else TINY_SIZES[tiny]

    def path(self, name: str) -> Path:
        return self.folder / f"{'wan14b' if self.on_gpu else 'tiny'}_{self.blocks}_{name}"

    def write_files(self, names: Iterable[str]) -> None:
        """Those of `names` that are missing; a whole file has its name."""
        makers = {
            WEIGHTS["fp8"]: lambda path: write_checkpoint(path, self.config, "fp8", str(self.device)),
            WEIGHTS["Q4_K"]: lambda path: write_gguf(path, self.config, "Q4_K", str(self.device)),
            LORA: lambda path: write_lora(path, self.config, 32),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = self.path(name)
            if not path.exists():
                partial = path.with_name(f"partial_{path.name}")
                makers[name](partial)
                partial.replace(path)

    def open(self, weights: str, lora: bool, settings: CompileSettings | None) -> StreamedWan:
        loras = [LoraChoice(self.path(LORA))] if lora else []
        model = StreamedWan(self.path(WEIGHTS[weights]), RunSettings(self.device, lora_mode="side"), loras=loras)
        model.compile(settings)
        return model

    def start(self, model: StreamedWan, size: tuple[int, int, int], streamed: bool, fused: bool = True) -> None:
        swap = self.blocks if streamed else 0
        limits = replace(card_limits(self.device), blocks_to_swap=swap, fused=fused and self.on_gpu)
        model.stop()
        self.free()
        model.start(model.make_plan(wan_work(self.config, size), limits))

    def run(
        self, model: StreamedWan, size: tuple[int, int, int], step: int = 0, prompt: int = 0
    ) -> tuple[Tensor, float]:
        """A pass's velocity, and its seconds."""
        width, height, frames = size
        latent = draw(self.device, step, 1, 16, (frames + 3) // 4, height // 8, width // 8)
        text = draw(self.device, 100 + prompt, 1, self.config.text_tokens, self.config.text_dim)
        self.wait()
        began = time.perf_counter()
        velocity = model(latent, torch.tensor([1000.0 - 45 * step], device=self.device), text)
        self.wait()
        return velocity, time.perf_counter() - began

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """Of the allocator, since the start."""
        return torch.cuda.max_memory_reserved(self.device) / GIB if self.on_gpu else 0.0


@cache
def card_limits(device: torch.device) -> Limits:
    """Of a card with all the VRAM that is wanted, its link timed once."""
    return limits_for(device, vram_budget_gib=VRAM_GIB)


def draw(device: torch.device, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def error_of(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())
