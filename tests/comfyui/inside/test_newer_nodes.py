"""Nodes of ComfyUI after 0.33 by stand-ins of their documented form: what they put on a MODEL, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
from comfy.patcher_extension import CallbacksMP
from test_framepack import folders, model, run, said  # noqa: F401 - fixtures
from test_other_nodes import lora_of_two_layers
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

SEAM = "lora_metadata" in inspect.signature(comfy.sd.load_lora_for_models).parameters
pytestmark = pytest.mark.skipif(not SEAM, reason="the form of newer nodes is not for a ComfyUI as old as this one")
VIDEO = empty_latent(size=(4, 8, 12))
GUIDED = {"cfg": 3.0, "total_second_length": 0.3, "steps": 3}
OVERRIDE = "optimized_attention_override"


def sparse(model: Any, keep: float = 0.5, dense_blocks: tuple[int, ...] = (0,), start: float = 0.2) -> Any:  # noqa: F811
    """Model Sparse Attention: an override upon the one that is there, put back at every step, forgotten afterwards."""
    copy, installed, seen = model.clone(), set(), []
    first = float(model.get_model_object("model_sampling").percent_to_sigma(start))

    def override_upon(previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        def override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **named: Any) -> Tensor:
            options = named.get("transformer_options") or {}
            dense = float(options["sigmas"][0]) > first or options.get("block_index") in dense_blocks
            if mask is not None or dense or q.shape[1] != k.shape[1] or named.get("skip_reshape"):
                if previous is not None:
                    return previous(func, q, k, v, heads, mask=mask, **named)
                return func(q, k, v, heads, mask=mask, **named)
            seen.append(options.get("block_index"))
            return best_keys(q, k, v, heads, keep)

        return override

    def install(options: dict[str, Any]) -> None:
        if options.get(OVERRIDE) not in installed:
            options[OVERRIDE] = override_upon(options.get(OVERRIDE))
            installed.add(options[OVERRIDE])

    install(copy.model_options["transformer_options"])
    copy.add_callback_with_key(
        CallbacksMP.ON_PREPARE_STATE, "sparse",
        lambda patcher, timestep, options: install(options["transformer_options"]),
    )  # fmt: skip
    copy.add_callback_with_key(CallbacksMP.ON_CLEANUP, "sparse", lambda patcher: seen.clear())
    return copy


def best_keys(q: Tensor, k: Tensor, v: Tensor, heads: int, keep: float) -> Tensor:
    """Each query sees the share of keys that it scores highest."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2).float() for each in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    least = scores.topk(max(1, int(keep * k.shape[2])), dim=-1).values[..., -1:]
    attended = scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v
    return attended.transpose(1, 2).flatten(2)


def lora_stack(model: Any) -> Any:  # noqa: F811
    """Load LoRA (Model): rows of one file each."""
    for strength in (0.7, -0.3, 1.1):
        model, _ = comfy.sd.load_lora_for_models(model, None, lora_of_two_layers(), strength, 0, lora_metadata={})
    return model


def rescaled(model: Any, share: float = 0.7) -> Any:  # noqa: F811
    """RescaleCFG of flow models, in the space of what is denoised."""

    def rescale(given: dict[str, Any]) -> Tensor:
        cond, uncond = given["cond_denoised"], given["uncond_denoised"]
        guided = uncond + given["cond_scale"] * (cond - uncond)
        axes = tuple(range(1, cond.ndim))
        scaled = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8))
        return given["input"] - (share * scaled + (1 - share) * guided)

    copy = model.clone()
    copy.set_model_sampler_cfg_function(rescale)
    return copy


NODES = {"Model Sparse Attention": sparse, "Load LoRA (Model)": lora_stack, "RescaleCFG": rescaled}


@pytest.mark.parametrize("name", NODES)
def test_on_wan_as_with_cores_model(models: Path, name: str) -> None:
    path, node = save(models, "t2v"), NODES[name]
    got, want = (sample(node(one), *prompts(), VIDEO, steps=4) for one in (ours(path), core(path)))
    assert relative_error(got, want) < 1e-3
    assert relative_error(got, sample(ours(path), *prompts(), VIDEO, steps=4)) > 1e-5


@pytest.mark.parametrize("name", ["Model Sparse Attention", "RescaleCFG"])
def test_on_framepack_with_an_effect(model: Any, name: str) -> None:  # noqa: F811
    given = GUIDED | {"negative": said(20)}
    assert relative_error(run(NODES[name](model), **given), run(model, **given)) > 1e-5


def test_sparse_attention_upon_another_override(models: Path) -> None:
    def upon(one: Any) -> Any:
        copy = one.clone()
        options = copy.model_options["transformer_options"]
        options[OVERRIDE] = lambda func, q, k, v, heads, **named: 0.9 * func(q, k, v, heads, **named)
        return sparse(copy)

    path = save(models, "t2v")
    got, want = (sample(upon(one), *prompts(), VIDEO, steps=4) for one in (ours(path), core(path)))
    assert relative_error(got, want) < 1e-3
