"""FlashVSR with tiny random weights, in the files and under the names that it is published in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from lowvram_video.vae.tiny import TinyVAE
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.upscale.decoder import CONDITIONAL
from lowvram_video.wanvideo.upscale.projection import LowQualityProjection, ProjectionConfig
from lowvram_video.wanvideo.upscale.request import UpscaleFiles
from safetensors.torch import save_file

from .tiny import TEXT_DIM, randomize

CONFIG = WanConfig("t2v", 96, 128, 2, 2, text_dim=TEXT_DIM, freq_dim=32)
PROJECTION = ProjectionConfig((24, 32), CONFIG.dim, 2)
DECODER = replace(CONDITIONAL, widths=(16, 12, 8, 8))


def save_flashvsr(folder: Path, prefix: str = "LQ_proj_in.") -> UpscaleFiles:
    """The four files; `prefix` is that of the projection's names, which differs between releases."""
    folder.mkdir(parents=True, exist_ok=True)
    text = torch.randn(1, 20, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    decoder = randomize(TinyVAE(DECODER), 2)
    torch.nn.init.constant_(decoder.decoder[26].bias, 0.5)  # grey
    parts = {
        "FlashVSR1_1": (randomize(WanModel(CONFIG)).state_dict(), ""),
        "LQ_proj_in": (randomize(LowQualityProjection(PROJECTION), 1).state_dict(), prefix),
        "TCDecoder": (decoder.state_dict(), ""),
        "Prompt": ({"context": text}, ""),
    }
    for name, (tensors, before) in parts.items():
        metadata = {"lowvram_video.num_heads": str(CONFIG.num_heads)} if name == "FlashVSR1_1" else None
        stored = {before + key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(stored, folder / f"{name}.safetensors", metadata)
    return UpscaleFiles(*(folder / f"{name}.safetensors" for name in parts))


def small_video(num_frames: int, width: int = 96, height: int = 64, seed: int = 5) -> torch.Tensor:
    """uint8 `[T, h, w, 3]`: smooth random colours that change."""
    noise = torch.rand(num_frames, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    frames = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
    return frames.mul(255).round().byte().permute(0, 2, 3, 1).contiguous()
