"""Tiny Wan checkpoints whose dimensions core can tell, and conditioning for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lowvram_pack.nodes.loaders import LoadWanModel
from lowvram_pack.wanvideo.network.config import WanConfig
from lowvram_pack.wanvideo.network.model import WanModel
from safetensors.torch import save_file
from torch import Tensor

TINY = WanConfig("t2v", dim=256, ffn_dim=384, num_heads=2, num_layers=4)
CONFIGS = {
    "t2v": TINY,
    "i2v": replace(TINY, model_type="i2v", in_channels=36, image_dim=1280),
    "flf2v": replace(TINY, model_type="flf2v", in_channels=36, image_dim=1280, image_pos_tokens=514),
    "i2v22": replace(TINY, model_type="i2v", in_channels=36),
    "ti2v": replace(TINY, model_type="ti2v", in_channels=48, out_channels=48),
    "vace": replace(TINY, model_type="vace", vace_layers=2, vace_channels=96),
    "fun control": replace(TINY, model_type="control", in_channels=52, reference_channels=16),
    "fun control 2.1": replace(TINY, model_type="control", in_channels=48, image_dim=1280),
    "fun camera": replace(TINY, model_type="camera", in_channels=32, image_dim=1280, camera_channels=24),
}
LATENT_SIZE = (3, 8, 12)  # frames, height, width
TEXT_TOKENS = 48  # umt5 gives 512, which would take most of these tests' time; neither network minds the number


def weights(config: WanConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in WanModel(config, device="meta").state_dict().items():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and not name.endswith(("modulation", "emb_pos")):
            values *= 0.7 / parameter[0].numel() ** 0.5
        elif ("norm" in name and name.endswith("weight")) or name.endswith(("proj.0.weight", "proj.4.weight")):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        tensors[name] = values
    return tensors


def save(folder: Path, variant: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    path = folder / f"{variant.replace(' ', '_')}_{str(dtype).split('.')[1]}_{seed}.safetensors"
    if not path.exists():
        tensors = weights(CONFIGS[variant], seed)
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def ours(path: Path, dtype: str = "fp32", quantization: str = "none") -> Any:
    return LoadWanModel.execute(path.name, dtype, "sdpa", quantization).result[0]


def core(path: Path) -> Any:
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})


def prompts(seed: int = 7, **values: Any) -> tuple[list[Any], list[Any]]:
    """Positive and negative CONDITIONING of random text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, TEXT_TOKENS, 4096, generator=generator)
    return [[text[:1], dict(values)]], [[text[1:], dict(values)]]


def empty_latent(channels: int = 16, batch: int = 1, size: tuple[int, int, int] = LATENT_SIZE) -> dict[str, Tensor]:
    return {"samples": torch.zeros(batch, channels, *size)}


def sample(model: Any, positive: Any, negative: Any, latent: dict[str, Tensor], **changes: Any) -> Tensor:
    """What the KSampler node makes."""
    import nodes

    settings = {"seed": 5, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"} | changes
    denoise = settings.pop("denoise", 1.0)
    return nodes.common_ksampler(
        model, settings.pop("seed"), settings.pop("steps"), settings.pop("cfg"), settings.pop("sampler_name"),
        settings.pop("scheduler"), positive, negative, latent, denoise=denoise, **settings,
    )[0]["samples"]  # fmt: skip


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
