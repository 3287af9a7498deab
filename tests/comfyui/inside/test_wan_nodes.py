"""Core's conditioning nodes before our model: pictures, first and last frames, control videos."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import comfy_extras.nodes_wan as nodes_wan
import pytest
import torch
from test_parity import BOUND, Vision
from tiny_models import core, ours, prompts, relative_error, sample, save

SIZE = {"width": 96, "height": 64, "length": 9, "batch_size": 1}


class StandInVAE:
    """Latents of the right shape that depend on the pixels."""

    def __init__(self, channels: int = 16, stride: int = 8):
        self.channels, self.stride = channels, stride
        self.latent_channels = channels

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        frames, height, width, _ = pixels.shape
        size = (1, self.channels, (frames - 1) // 4 + 1, height // self.stride, width // self.stride)
        generator = torch.Generator().manual_seed(int(pixels.double().sum() * 100) % 2**31)
        return torch.randn(size, generator=generator)

    def spacial_compression_encode(self) -> int:
        return self.stride


def picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(seed))


def run_node(name: str, **inputs: Any) -> tuple[Any, ...]:
    node = getattr(nodes_wan, name)
    known = inspect.signature(node.execute).parameters
    return tuple(node.execute(**{key: value for key, value in inputs.items() if key in known}).result)


def conditions(name: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    positive, negative = prompts()
    common = {"positive": positive, "negative": negative, "vae": StandInVAE(), **SIZE}
    if name == "Wan22ImageToVideoLatent":
        (latent,) = run_node(name, **(common | {"vae": StandInVAE(48, 16)}), start_image=picture(1))
        return positive, negative, latent
    if name == "WanVaceToVideo":
        out = run_node(
            name, **common, strength=0.7, control_video=picture(1).repeat(9, 1, 1, 1), reference_image=picture(2)
        )
        return out[:3]
    images = {
        "start_image": picture(1), "end_image": picture(2), "clip_vision_output": Vision(257),
        "clip_vision_start_image": Vision(257), "clip_vision_end_image": Vision(257),
    }  # fmt: skip
    return run_node(name, **common, **images)[:3]


CASES = {
    "WanImageToVideo": "i2v",
    "WanFirstLastFrameToVideo": "flf2v",
    "Wan22ImageToVideoLatent": "ti2v",
    "WanVaceToVideo": "vace",
}


@pytest.mark.parametrize("name", CASES)
def test_a_conditioning_node_works_as_with_cores_model(models: Path, name: str) -> None:
    path = save(models, CASES[name])
    positive, negative, latent = conditions(name)
    results = [sample(model, positive, negative, latent) for model in (ours(path), core(path))]
    error = relative_error(*results)
    print(f"{name}: relative error {error:.2e}")
    assert results[0].shape == latent["samples"].shape
    assert error < BOUND
