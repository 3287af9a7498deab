"""Numbers that ComfyUI's own check of ranges lets by, as NaN and what other nodes give, are refused by our nodes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_pack.nodes.block_swap import BlockSwap
from lowvram_pack.nodes.bridge.upscaling import FlashVSRModel
from lowvram_pack.nodes.lora import LoadLora
from lowvram_pack.nodes.nag import NegativeGuidance
from lowvram_pack.nodes.plan import VramPlan
from lowvram_pack.nodes.save_video import SaveVideo
from lowvram_pack.nodes.upscale import UpscaleVideo
from lowvram_pack.runtime.settings import RunSettings
from safetensors.torch import save_file
from tiny_models import empty_latent, ours, prompts, sample, save

BAD = [math.nan, math.inf, -math.inf]
SWAP: dict[str, Any] = {"blocks_to_swap": -1, "prefetch": 0, "pinned_memory": True}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["vram_budget_gb", "ram_budget_gb"])
def test_block_swap(models: Path, name: str, value: float) -> None:
    budgets = {"vram_budget_gb": 0.0, "ram_budget_gb": 0.0, name: value}
    with pytest.raises(ValueError, match=rf"{name} is .*: use a number from 0 up"):
        BlockSwap.execute(ours(save(models, "t2v")), **SWAP, **budgets)


@pytest.mark.parametrize("value", BAD)
def test_vram_plan(models: Path, value: float) -> None:
    with pytest.raises(ValueError, match="card_gb is"):
        VramPlan.execute(ours(save(models, "t2v")), 832, 480, 81, True, value)


def test_a_card_that_the_desktop_fills(models: Path) -> None:
    told = VramPlan.execute(ours(save(models, "t2v")), 832, 480, 81, True, 0.5).result[1]
    assert told.startswith("card_gb is 0.5, all of which is left to the desktop")


@pytest.mark.parametrize("value", [*BAD, 1e30])
def test_strengths_of_loras(models: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our node, and by core's, whose patches we read."""
    path, layer = models / "style.safetensors", "diffusion_model.blocks.0.self_attn.q"
    down, up = torch.randn(4, 256), torch.randn(256, 4)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    model = ours(save(models, "t2v"))
    monkeypatch.setattr("lowvram_pack.nodes.bridge.host.model_path", lambda *_: path)
    with pytest.raises(ValueError, match="its strength is"):
        LoadLora.execute(model, path.name, value)
    patched = LoadLora.execute(model, path.name, 1.0).result[0].clone()
    patched.patches = {
        key: [(value, *patch[1:]) for patch in found] for key, found in patched.patches.items()
    }  # fmt: skip
    with pytest.raises(ValueError, match="its strength is"):
        sample(patched, *prompts(), empty_latent())


@pytest.mark.parametrize("value", [*BAD, 1e30])
@pytest.mark.parametrize("name", ["nag_scale", "nag_tau", "nag_alpha"])
def test_nag(models: Path, name: str, value: float) -> None:
    numbers = {"nag_scale": 5.0, "nag_tau": 2.5, "nag_alpha": 0.25, name: value}
    with pytest.raises(ValueError, match=rf"{name} is .*: use a number from 0"):
        NegativeGuidance.execute(ours(save(models, "t2v")), prompts()[1], **numbers)


@pytest.mark.parametrize("value", [*BAD, 0.0, -1.0])
def test_rates_of_videos(value: float) -> None:
    """Also those that another node gives, whose range nobody checks."""
    with pytest.raises(ValueError, match=r"fps is .*: use a number above 0"):
        SaveVideo.execute({"samples": torch.zeros(1, 16, 1, 4, 4)}, None, "a", value, "H.264", 12, 0, False)
    with pytest.raises(ValueError, match=r"fps is .*: use a number above 0"):
        _upscale(images=torch.zeros(1, 8, 8, 3), fps=value)


@pytest.mark.parametrize(("name", "value"), [*(("vram_budget_gb", value) for value in BAD), ("sparse_ratio", math.nan)])
def test_upscaling(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        _upscale(**{name: value})


def _upscale(**given: Any) -> None:
    numbers: dict[str, Any] = {"fps": 16.0, "vram_budget_gb": 0.0, "sparse_ratio": 2.0, "local_range": "11"}
    others = {"filename_prefix": "a", "crf": 16, "resume": False, "colour": "adain", "kept_windows": 3, "seed": 0}
    settings = RunSettings()
    UpscaleVideo.execute(FlashVSRModel(None, settings, "1.1"), scale="2", **{**numbers, **others, **given})
