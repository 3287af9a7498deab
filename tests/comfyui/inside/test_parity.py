"""Our MODEL and core's with the same weights and the same KSampler seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LATENT_SIZE, core, empty_latent, ours, prompts, relative_error, sample, save

BOUND = 1e-3


class Vision:
    """What CLIPVisionEncode gives."""

    def __init__(self, tokens: int):
        self.penultimate_hidden_states = torch.randn(1, tokens, 1280, generator=torch.Generator().manual_seed(3))


def picture_conditions(tokens: int | None) -> dict[str, Any]:
    """What WanImageToVideo puts into the conditioning."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.ones(1, 1, *LATENT_SIZE)
    mask[:, :, :1] = 0.0
    image = torch.randn(1, 16, *LATENT_SIZE, generator=generator)
    values: dict[str, Any] = {"concat_latent_image": image, "concat_mask": mask}
    if tokens:
        values["clip_vision_output"] = Vision(tokens)
    return values


def vace_conditions() -> dict[str, Any]:
    """What WanVaceToVideo puts into the conditioning."""
    generator = torch.Generator().manual_seed(4)
    return {
        "vace_frames": [torch.randn(1, 32, *LATENT_SIZE, generator=generator)],
        "vace_mask": [torch.rand(1, 64, *LATENT_SIZE, generator=generator)],
        "vace_strength": [0.8],
    }


def fun_control_conditions() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    return {
        "concat_latent_image": torch.randn(1, 32, *LATENT_SIZE, generator=generator),
        "reference_latents": [torch.randn(1, 16, 1, *LATENT_SIZE[1:], generator=generator)],
    }


def camera_conditions() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    frames, height, width = LATENT_SIZE
    rays = torch.randn(1, 24, frames, 8 * height, 8 * width, generator=generator)
    return {
        "camera_conditions": rays,
        "concat_latent_image": torch.randn(1, 16, *LATENT_SIZE, generator=generator),
        "clip_vision_output": Vision(257),
    }


CASES = {
    "t2v": {},
    "i2v": picture_conditions(257),
    "i2v22": picture_conditions(None),
    "flf2v": picture_conditions(514),
    "vace": vace_conditions(),
    "fun control": fun_control_conditions(),
    "fun camera": camera_conditions(),
}


def compare(path: Path, conditions: dict[str, Any], latent: dict[str, torch.Tensor], **settings: Any) -> float:
    results = [sample(model, *prompts(**conditions), latent, **settings) for model in (ours(path), core(path))]
    assert results[0].std() > 0.1
    return relative_error(*results)


@pytest.mark.parametrize("variant", CASES)
def test_latents_equal_cores(models: Path, variant: str) -> None:
    error = compare(save(models, variant), CASES[variant], empty_latent())
    print(f"{variant}: relative error {error:.2e}")
    assert error < BOUND


def test_latents_equal_cores_for_a_first_frame(models: Path) -> None:
    """TI2V: a noise mask holds the first frame, so timesteps differ per frame."""
    latent = empty_latent(48)
    latent["samples"][:, :, :1] = torch.randn(1, 48, 1, *LATENT_SIZE[1:], generator=torch.Generator().manual_seed(4))
    mask = torch.ones(1, 1, *LATENT_SIZE)
    mask[:, :, :1] = 0.0
    latent["noise_mask"] = mask
    error = compare(save(models, "ti2v"), {}, latent)
    print(f"ti2v with a first frame: relative error {error:.2e}")
    assert error < BOUND


def test_latents_equal_cores_for_odd_sizes_and_batches(models: Path) -> None:
    """Latents that patches do not divide are padded as core does."""
    error = compare(save(models, "t2v"), {}, empty_latent(batch=2, size=(2, 7, 9)))
    print(f"odd size, batch of 2: relative error {error:.2e}")
    assert error < BOUND
