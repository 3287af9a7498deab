"""Normalised attention guidance against its published formula in plain fp32 PyTorch, on Wan's blocks."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.cli.nag import nag_settings
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.nag import NagSettings, guide_
from lowvram_video.wanvideo.network.model import Extras, Nag, WanModel
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from torch import Tensor

from .tiny import CONFIGS, randomize, save_files

SETTINGS = NagSettings(7.0, 1.5, 0.4)


def published(positive: Tensor, negative: Tensor, settings: NagSettings) -> Tensor:
    """As in ChenDarYen/Normalized-Attention-Guidance."""
    guidance = positive * settings.scale - negative * (settings.scale - 1)
    norm_positive = positive.norm(p=1, dim=-1, keepdim=True)
    norm_guidance = guidance.norm(p=1, dim=-1, keepdim=True)
    scale = torch.nan_to_num(norm_guidance / norm_positive, nan=10.0)
    shortened = guidance * norm_positive * settings.tau / (norm_guidance + 1e-7)
    guidance = torch.where(scale > settings.tau, shortened, guidance)
    return guidance * settings.alpha + positive * (1 - settings.alpha)


def test_the_formula_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(10, 16, generator=generator) for _ in range(2))
    positive[3] = 0  # nothing to be compared with
    want = published(positive, negative, SETTINGS)
    got = positive.clone()
    guide_(got, negative.clone(), SETTINGS, (slice(0, 4), slice(4, 10)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def velocity(variant: str, nag: Nag | None, execution: Execution, batch: int = 2) -> Tensor:
    config = CONFIGS[variant]
    model = randomize(WanModel(config))
    assert isinstance(model, WanModel)
    model.execution = execution
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, config.in_channels, 3, 8, 8, generator=generator)
    text = torch.randn(batch, config.text_tokens, config.text_dim, generator=generator)
    image = torch.randn(batch, 257, config.image_dim, generator=generator) if config.image_dim else None
    return model(latent, torch.full((batch,), 500.0), text, image, Extras(nag=nag))


def negative(samples: tuple[bool, ...] | None, settings: NagSettings = SETTINGS) -> Nag:
    config = CONFIGS["t2v"]
    text = torch.randn(1, config.text_tokens, config.text_dim, generator=torch.Generator().manual_seed(2))
    return Nag(text, settings, samples)


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize("execution", [{"token_chunk": 16}, {"head_groups": 2}, {"query_chunk": 16}], ids=str)
def test_rows_and_heads_in_parts_change_nothing(variant: str, execution: dict[str, int]) -> None:
    nag = negative((True, False))
    got, want = velocity(variant, nag, Execution(**execution)), velocity(variant, nag, Execution())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    plain = velocity(variant, None, Execution())
    torch.testing.assert_close(want[1], plain[1], rtol=1e-4, atol=1e-5)  # the other sample is not guided
    assert float((want[0] - plain[0]).norm() / plain[0].norm()) > 1e-3


def test_keys_in_8_bits_leave_no_bytes_for_the_negative_prompts_queries() -> None:
    nag = negative((True, False))
    got, want = velocity("i2v", nag, Execution(query_chunk=16, packed_keys=True)), velocity("i2v", nag, Execution())
    assert float((got - want).norm() / want.norm()) < 1e-2


def test_without_any_share_it_is_the_model_itself() -> None:
    off = replace(SETTINGS, alpha=0.0)
    assert not off.is_on and not replace(SETTINGS, scale=1.0).is_on
    torch.testing.assert_close(velocity("t2v", negative(None, off), Execution()), velocity("t2v", None, Execution()))


def test_the_flags_of_the_command_line() -> None:
    def flags(**given: float) -> Namespace:
        return Namespace(**({"nag": None, "nag_tau": None, "nag_alpha": None} | given))

    assert nag_settings(flags()) is None and nag_settings(flags(nag=1.0)) is None
    assert nag_settings(flags(nag=7.0, nag_tau=1.5, nag_alpha=0.4)) == SETTINGS
    for wrong in ({"nag_tau": 2.0}, {"nag": -1.0}, {"nag": 5.0, "nag_alpha": 2.0}):
        with pytest.raises(ValueError, match="nag"):
            nag_settings(flags(**wrong))


def test_a_video_of_the_pipeline(tmp_path: Path) -> None:
    files = save_files(tmp_path)
    request = WanRequest("a cat", width=32, height=32, num_frames=5, num_steps=2, guidance=1.0)

    def video(**changes: Any) -> Tensor:
        return torch.cat([*WanPipeline(files, RunSettings()).generate(replace(request, **changes))]).float()

    strong = NagSettings(100.0, 50.0, 1.0)
    plain, guided = video(), video(nag=strong)
    assert not torch.equal(plain, guided)
    assert torch.equal(guided, video(nag=strong))
    assert not torch.equal(guided, video(nag=strong, negative_prompt="a cat on a mat"))


@pytest.mark.parametrize("values", [{"scale": -1.0}, {"tau": float("nan")}, {"alpha": 1.5}])
def test_settings_that_are_no_use_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"nag_{next(iter(values))}"):
        replace(NagSettings(), **values).check()
