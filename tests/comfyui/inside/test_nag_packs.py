"""Negative Guidance (NAG) beside the public packs' own code, unmodified, on core's model of the same weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lowvram_pack.nodes.nag import NegativeGuidance
from other_nodes import known_of_kjnodes, place_of
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

SCALE, TAU, ALPHA = 7.0, 1.5, 0.4
NEGATIVE = prompts(11)[0]
PACKAGE = "comfyui_nag"


def guided(path: Path) -> Any:
    return NegativeGuidance.execute(ours(path), NEGATIVE, SCALE, TAU, ALPHA).result[0]


def given_of(variant: str) -> dict[str, Any]:
    """What core's nodes give the prompts of an I2V model."""
    if variant != "i2v":
        return {}
    generator = torch.Generator().manual_seed(3)
    seen = type("Seen", (), {"penultimate_hidden_states": torch.randn(1, 257, 1280, generator=generator)})()
    return {"clip_vision_output": seen}


@pytest.mark.parametrize(("variant", "inplace"), [("t2v", False), ("t2v", True), ("i2v", False), ("vace", False)])
def test_as_kjnodes(models: Path, variant: str, inplace: bool) -> None:
    """At CFG 1: above, it guides the first half of a batch, which is core's unconditional one."""
    node, path = known_of_kjnodes()["WanVideoNAG"], save(models, variant)
    conds = prompts(**given_of(variant))
    patched = node().patch(core(path), NEGATIVE, SCALE, ALPHA, TAU, "default", inplace)[0]
    want = sample(patched, *conds, empty_latent(), cfg=1.0)
    check(path, conds, 1.0, want, f"KJNodes {variant}")


@pytest.mark.parametrize(("variant", "cfg"), [("t2v", 1.0), ("t2v", 3.0), ("i2v", 1.0)])
def test_as_comfyui_nag(models: Path, variant: str, cfg: float) -> None:
    """By its network's forward: its nodes do not load in ComfyUI 0.33, for the sake of another architecture.

    With a batch of I2V's it fails; VACE's control blocks it guides too, which KJNodes' leaves alone, and ours.
    """
    path, conds = save(models, variant), prompts(**given_of(variant))
    model = core(path)
    switch = network_of_comfyui_nag().NAGWanModelSwitch(
        model.model.diffusion_model, [[NEGATIVE[0][0].clone(), {}]], SCALE, TAU, ALPHA, 0.0
    )
    switch.set_nag()
    check(path, conds, cfg, sample(model, *conds, empty_latent(), cfg=cfg), f"ComfyUI-NAG {variant} cfg {cfg}")


def check(path: Path, conds: Any, cfg: float, want: Tensor, title: str) -> None:
    got, plain = (sample(one, *conds, empty_latent(), cfg=cfg) for one in (guided(path), ours(path)))
    error, effect = relative_error(got, want), relative_error(got, plain)
    print(f"{title}: error {error:.1e}, effect {effect:.1e}")
    assert error < 1e-4 and effect > 1e-3


def network_of_comfyui_nag() -> ModuleType:
    """`wan/model.py` of the pack, as it is, without what its `__init__.py` imports."""
    package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    package.__path__ = [str(place_of("ComfyUI-NAG", "COMFYUI_NAG_DIR"))]
    return importlib.import_module(f"{PACKAGE}.wan.model")
