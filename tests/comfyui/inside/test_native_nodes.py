"""Core's nodes after our loader: each changes the result, and as it does with core's own model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import comfy_extras.nodes_context_windows as context_windows
import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_model_advanced as model_advanced
import comfy_extras.nodes_rope as rope
import comfy_extras.nodes_slg as slg
import pytest
import torch
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save

BOUND = 1e-3
Change = Callable[[Any], Any]


def lora(rank: int = 4, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Low-rank updates of some layers and a full difference of a bias, under the names of a Wan LoRA."""
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for layer, (out, inner) in {"self_attn.q": (256, 256), "cross_attn.v": (256, 256), "ffn.0": (384, 256)}.items():
        for block in range(4):
            key = f"diffusion_model.blocks.{block}.{layer}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) / inner**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * scale
    tensors["diffusion_model.head.head.diff_b"] = torch.randn(64, generator=generator) * scale
    return tensors


def with_lora(model: Any) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora(), 0.8, 0)[0]


def with_easycache(model: Any) -> Any:
    return easycache.EasyCacheNode.execute(model, 0.5, 0.0, 1.0, False).result[0]


def with_windows(model: Any) -> Any:
    node = context_windows.WanContextWindowsManualNode
    values = {
        "context_length": 13, "context_overlap": 5, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "freenoise": False,
    }  # fmt: skip
    known = inspect.signature(node.execute).parameters
    return node.execute(model, **{name: value for name, value in values.items() if name in known}).result[0]


def with_shift(model: Any) -> Any:
    return model_advanced.ModelSamplingSD3().patch(model, 2.0)[0]


def with_skipped_layer(model: Any) -> Any:
    return slg.SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, "1,2", "", 0.0).result[0]


def with_scaled_rope(model: Any) -> Any:
    return rope.ScaleROPE.execute(model, 0.8, 1.0, 0.9, 2.0, 0.5, 3.0).result[0]


CHANGES: dict[str, Change] = {
    "LoRA": with_lora,
    "EasyCache": with_easycache,
    "context windows": with_windows,
    "ModelSamplingSD3": with_shift,
    "skip layer guidance": with_skipped_layer,
    "scaled RoPE": with_scaled_rope,
    "LoRA, shift and EasyCache": lambda model: with_easycache(with_shift(with_lora(model))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_native_node_does_what_it_does_with_cores_model(models: Path, name: str) -> None:
    path = save(models, "t2v")
    latent, steps = empty_latent(size=(7, 8, 12)), 8 if "EasyCache" in name else 3
    model = ours(path)
    plain = sample(model, *prompts(), latent, steps=steps)
    changed = sample(CHANGES[name](model), *prompts(), latent, steps=steps)
    wanted = sample(CHANGES[name](core(path)), *prompts(), latent, steps=steps)
    error, effect = relative_error(changed, wanted), relative_error(changed, plain)
    print(f"{name}: effect {effect:.2e}, relative error to core's {error:.2e}")
    # positions matter little to a model of random weights, so effects differ in size
    assert effect > max(2 * BOUND, 100 * error)
    assert error < BOUND
    again = sample(model, *prompts(), latent, steps=steps)
    assert torch.equal(again, plain), "taking the node out again restores the model exactly"


@pytest.mark.parametrize("stored", ["fp8 file", "fp8", "int8"])
def test_lora_on_8_bit_weights_is_merged_and_taken_out_exactly(models: Path, stored: str) -> None:
    if stored == "fp8 file":
        model = ours(save(models, "t2v", torch.float8_e4m3fn))
    else:
        model = ours(save(models, "t2v"), quantization=stored)
    plain = sample(model, *prompts(), empty_latent())
    changed = sample(with_lora(model), *prompts(), empty_latent())
    exact = sample(with_lora(ours(save(models, "t2v"))), *prompts(), empty_latent())
    print(
        f"LoRA on {stored}: effect {relative_error(changed, plain):.2e}, to fp32 {relative_error(changed, exact):.2e}"
    )
    assert relative_error(changed, exact) < 0.5 * relative_error(plain, exact)
    assert torch.equal(sample(model, *prompts(), empty_latent()), plain)


def test_two_experts_with_ksampler_advanced(models: Path) -> None:
    """Wan 2.2: the high-noise model's first steps, then the low-noise model's."""
    import nodes

    paths = save(models, "t2v"), save(models, "t2v", seed=1)
    results = []
    for load in (ours, core):
        positive, negative = prompts()
        latent = empty_latent()
        for path, (first, last) in zip(paths, ((0, 2), (2, 10)), strict=True):
            (latent,) = nodes.KSamplerAdvanced().sample(
                load(path), "enable" if first == 0 else "disable", 3, 4, 3.5, "euler", "simple", positive, negative,
                latent, first, last, "enable" if first == 0 else "disable",
            )  # fmt: skip
        results.append(latent["samples"])
    error = relative_error(*results)
    print(f"two experts: relative error {error:.2e}")
    assert error < BOUND


def test_sampler_custom_advanced(models: Path) -> None:
    path = save(models, "t2v")
    results = []
    for model in (ours(path), core(path)):
        positive, _ = prompts()
        noise = custom_sampler.RandomNoise.execute(3).result[0]
        guider = custom_sampler.BasicGuider.execute(model, positive).result[0]
        sampler = custom_sampler.KSamplerSelect.execute("uni_pc").result[0]
        sigmas = custom_sampler.BasicScheduler.execute(model, "beta", 4, 1.0).result[0]
        out = custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, empty_latent())
        results.append(out.result[0]["samples"])
    error = relative_error(*results)
    print(f"SamplerCustomAdvanced: relative error {error:.2e}")
    assert error < BOUND


def test_prompt_hooked_loras_are_refused_in_one_line(models: Path) -> None:
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora(), 1.0, 1.0)
    positive, negative = prompts()
    positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    with pytest.raises(ValueError, match="Load LoRA"):
        sample(ours(save(models, "t2v")), positive, negative, empty_latent())
