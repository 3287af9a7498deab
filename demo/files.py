"""The demo model's files, and a pipeline made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.settings import RunSettings
from ..wanvideo.identity import WanFiles
from ..wanvideo.pipeline import WanPipeline
from ..wanvideo.request import WanRequest

FOLDER = Path(__file__).parent
DEMO_FILES = WanFiles(
    model=FOLDER / "wan2.1_t2v_demo.safetensors",
    text_encoder=FOLDER / "umt5_demo_enc.safetensors",
    vae=FOLDER / "wan_2.1_vae_demo.safetensors",
)


def open_demo(device: torch.device, model: Path = DEMO_FILES.model, quantization: str = "none") -> WanPipeline:
    """The tiny model, ready for any number of prompts; it stays in RAM. `model` is another file of it."""
    settings = RunSettings(device=device, quantization=quantization, keep_loaded=True)
    return WanPipeline(replace(DEMO_FILES, model=model), settings)


def make_clip(pipeline: WanPipeline, prompt: str, seed: int) -> Tensor:
    """One clip, uint8 `[T, H, W, 3]`."""
    # trained with the empty prompt as the negative one
    return torch.cat(list(pipeline.generate(WanRequest(prompt, negative_prompt="", seed=seed))))
