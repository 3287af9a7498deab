"""What nodes change while the network runs: masks of attention, a block's inputs, parts in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor, nn

pytestmark = pytest.mark.newest
BOUND, EFFECT = 1e-3, 1e-3
VIDEO = empty_latent(size=(3, 4, 6))
OVERRIDE = "optimized_attention_override"


def made(model: Any) -> Tensor:
    return sample(model, *prompts(), VIDEO, steps=2)


def as_core(path: Path, change: Callable[[Any], Any]) -> None:
    got, want = (made(change(model)) for model in (ours(path), core(path)))
    assert relative_error(got, want) < BOUND
    assert relative_error(got, made(ours(path))) > EFFECT


def refused(path: Path, change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        made(change(ours(path)))
    assert "\n" not in str(error.value) and "LowVRAM" in str(error.value)


def masked(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **named: Any) -> Tensor:
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    seen[:, ::3] = False
    return func(q, k, v, heads, mask=seen, **named)


def masked_by_heads(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **named: Any) -> Tensor:
    seen = torch.zeros(q.shape[1], k.shape[1])
    seen[:, ::3] = -1.5
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return func(q, k, v, heads, seen, None, True, **named)


def scaled(func: Any, *given: Any, **named: Any) -> Tensor:
    return func(*given, **(named | {"scale": 0.2}))


@pytest.mark.parametrize("override", [masked, masked_by_heads, scaled])
def test_an_override_may_ask_for_a_mask_or_another_scale(models: Path, override: Any) -> None:
    def change(model: Any) -> Any:
        clone = model.clone()
        clone.model_options["transformer_options"][OVERRIDE] = override
        return clone

    as_core(save(models, "t2v"), change)


def replaced(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """Block 1, shown other inputs."""

    def patch(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_patch_replace(
            lambda given, more: more["original_block"](given | change(given)), "dit", "double_block", 1
        )
        return clone

    return patch


def with_option(given: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"transformer_options": given["transformer_options"] | options}


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "vec": lambda given: {"vec": given["vec"] * 0.9},
    "txt": lambda given: {"txt": given["txt"] * 0.9},
    "pe": lambda given: {"pe": given["pe"] * 0.9},
    OVERRIDE: lambda given: with_option(given, **{OVERRIDE: masked}),
    "patches": lambda given: with_option(given, patches={"attn1_patch": [lambda seen: seen["x"] * 0.9]}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_replaced_block_has_its_own_inputs(models: Path, name: str) -> None:
    refused(save(models, "t2v"), replaced(CHANGES[name]), f"reads or changes its .*{name}")


def test_a_replaced_block_may_be_shown_copies_of_them(models: Path) -> None:
    def copies(given: dict[str, Any]) -> dict[str, Any]:
        return {"img": given["img"] * 0.9, "vec": given["vec"].clone(), **with_option(given, of_the_node=1)}

    as_core(save(models, "t2v"), replaced(copies))


def part_of(network: nn.Module, path: str) -> nn.Module:
    return network.get_submodule(path)


@contextmanager
def forward_patched(part: nn.Module) -> Iterator[None]:
    own = part.forward
    with mock.patch.object(part, "forward", lambda *given, **named: own(*given, **named) * 1.1):
        yield


@contextmanager
def hooked(part: nn.Module) -> Iterator[None]:
    handle = part.register_forward_hook(lambda module, given, out: out * 1.1)
    try:
        yield
    finally:
        handle.remove()


def while_called(change: Callable[[nn.Module], Any], path: str) -> Callable[[Any], Any]:
    """A part changed around each call of the model, as packs of step caches do it."""

    def patch(model: Any) -> Any:
        clone = model.clone()
        network = clone.get_model_object("diffusion_model")

        def wrapper(apply: Any, given: dict[str, Any]) -> Tensor:
            with change(part_of(network, path)):
                return apply(given["input"], given["timestep"], **given["c"])

        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    return patch


@pytest.mark.parametrize("change", [forward_patched, hooked])
@pytest.mark.parametrize("path", ["head", "patch_embedding", "time_embedding"])
def test_a_part_that_is_called_may_be_changed_in_its_place(models: Path, change: Any, path: str) -> None:
    as_core(save(models, "t2v"), while_called(change, path))


@pytest.mark.parametrize("change", [forward_patched, hooked])
@pytest.mark.parametrize(
    "path", ["blocks.1", "blocks.1.self_attn", "blocks.1.ffn", "blocks.1.self_attn.norm_q", "text_embedding"]
)
def test_a_part_that_is_not_called_is_refused(models: Path, change: Any, path: str) -> None:
    refused(save(models, "t2v"), while_called(change, path), f"forward of diffusion_model.{path}")


def test_a_part_that_a_node_changes_for_good_is_refused(models: Path) -> None:
    def patch(model: Any) -> Any:
        model.model.diffusion_model.blocks[1].cross_attn.forward = lambda *given, **named: given[0]
        return model

    refused(save(models, "t2v", seed=31), patch, r"forward of diffusion_model.blocks.1.cross_attn")


def test_a_part_that_ours_has_not(models: Path) -> None:
    refused(
        save(models, "t2v"),
        lambda model: model.get_model_object("diffusion_model.blocks.1.norm1"),
        r"its part 'diffusion_model.blocks.1.norm1'.*take that node out",
    )


def shown(tokens: int, features: int) -> dict[str, Any]:
    seen = SimpleNamespace(penultimate_hidden_states=torch.zeros(1, tokens, features))
    return {"clip_vision_output": seen}


def test_prompts_and_pictures_of_other_encoders(models: Path) -> None:
    short = [[[text[:, :, :768], options]] for ((text, options),) in prompts()]
    for variant, conds, words in (
        ("i2v", prompts(**shown(729, 1152)), "1152 features.*1280: .*clip_vision_h"),
        ("i2v", short, "768 features a token.*4096: .*umt5-xxl"),
        ("flf2v", prompts(**shown(771, 1280)), "771 tokens.*514: .*first and the last"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            sample(ours(save(models, variant)), *conds, VIDEO)
        assert "\n" not in str(error.value)
