"""Negative Guidance (NAG) beside core's model with the published formula in its cross-attention."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as attention
import pytest
import torch
from lowvram_pack.nodes.nag import NegativeGuidance
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

SCALE, TAU, ALPHA = 7.0, 1.5, 0.4
NEGATIVE = prompts(11)[0]


def published(model: Any) -> Any:
    """Core's model, as public packs guide it: the formula of ChenDarYen/Normalized-Attention-Guidance."""
    copy = model.clone()
    network = copy.get_model_object("diffusion_model")
    bad = network.text_embedding(NEGATIVE[0][0].float())

    def attend(self: Any, q: Tensor, context: Tensor) -> Tensor:
        k, v = self.norm_k(self.k(context)), self.v(context)
        return attention.optimized_attention(q, k, v, heads=self.num_heads)

    def forward(self: Any, x: Tensor, context: Tensor, context_img_len: int | None = None, **named: Any) -> Tensor:
        q = self.norm_q(self.q(x))
        pictures = 0.0
        if hasattr(self, "k_img"):
            seen, context = context[:, :context_img_len], context[:, context_img_len:]
            k, v = self.norm_k_img(self.k_img(seen)), self.v_img(seen)
            pictures = attention.optimized_attention(q, k, v, heads=self.num_heads)
        good = attend(self, q, context)
        guided = good * SCALE - attend(self, q, bad.expand(len(x), -1, -1)) * (SCALE - 1)
        norm, length = (tensor.norm(p=1, dim=-1, keepdim=True) for tensor in (good, guided))
        guided = torch.where(length / norm > TAU, guided * norm * TAU / (length + 1e-7), guided)
        return self.o(guided * ALPHA + good * (1 - ALPHA) + pictures)

    for index, block in enumerate(network.blocks):
        path = f"diffusion_model.blocks.{index}.cross_attn.forward"
        copy.add_object_patch(path, types.MethodType(forward, block.cross_attn))
    return copy


def guided(model: Any, scale: float = SCALE, alpha: float = ALPHA) -> Any:
    return NegativeGuidance.execute(model, NEGATIVE, scale, TAU, alpha).result[0]


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_as_the_public_formula_at_cfg_1(models: Path, variant: str) -> None:
    path = save(models, variant)
    seen = type("Seen", (), {"penultimate_hidden_states": torch.randn(1, 257, 1280)})()
    given = {"clip_vision_output": seen} if variant == "i2v" else {}
    got = sample(guided(ours(path)), *prompts(**given), empty_latent(), cfg=1.0)
    want = sample(published(core(path)), *prompts(**given), empty_latent(), cfg=1.0)
    plain = sample(ours(path), *prompts(**given), empty_latent(), cfg=1.0)
    assert relative_error(got, want) < 1e-4
    assert relative_error(got, plain) > 1e-3


def test_off_is_the_same_to_the_last_bit(models: Path) -> None:
    model = ours(save(models, "t2v"))
    plain = sample(model, *prompts(), empty_latent(), cfg=1.0, steps=2)
    for off in (guided(model, scale=1.0), guided(model, alpha=0.0)):
        assert torch.equal(sample(off, *prompts(), empty_latent(), cfg=1.0, steps=2), plain)


def test_with_cfg_the_unconditional_prompt_is_left_alone(models: Path) -> None:
    model = ours(save(models, "t2v"))
    positive, negative = prompts()
    # at cfg 0 only the unconditional pass counts
    settings = {"cfg": 0.0, "steps": 2}
    plain = sample(model, positive, negative, empty_latent(), **settings)
    assert relative_error(sample(guided(model), positive, negative, empty_latent(), **settings), plain) < 1e-6


@pytest.mark.parametrize("key", ["start_percent", "mask", "hooks"])
def test_what_attention_would_leave_out_is_refused(models: Path, key: str) -> None:
    given = [[NEGATIVE[0][0], {key: 0.5}]]
    with pytest.raises(ValueError, match=f"{key!r}, which attention to it does not hear"):
        NegativeGuidance.execute(ours(save(models, "t2v")), given, SCALE, TAU, ALPHA)
