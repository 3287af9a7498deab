"""Core's patches around and inside the blocks of a Wan model: called with what core's own model gives them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import comfy.ldm.wan.model
import comfy.model_patcher
import pytest
import torch
from test_parity import fun_control_conditions, vace_conditions
from tiny_models import LATENT_SIZE, core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

BOUND = 1e-3
KINDS = ("double_block", "attn1_patch", "attn2_patch")
VARIANTS = {"t2v": dict, "vace": vace_conditions, "fun control": fun_control_conditions}
SOURCE = inspect.getsource(comfy.ldm.wan.model)


def in_core(kind: str) -> None:
    if f'"{kind}" in patches' not in SOURCE:
        pytest.skip(f"this ComfyUI's Wan model has no {kind}")


class Recorder:
    """A patch that changes what it is shown, by all that it is given, and keeps it."""

    def __init__(self, kind: str):
        self.kind = kind
        self.seen: list[dict[str, Any]] = []

    def __call__(self, given: dict[str, Any]) -> Any:
        options = given["transformer_options"]
        kept = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
        kept["options"] = {name: options.get(name) for name in ("block_index", "grid_sizes", "total_blocks")}
        kept |= {name: given[name] for name in ("block_index", "img_offset") if name in given}
        self.seen.append(kept)
        if self.kind == "double_block":
            vector = given["vec"][:, None] if given["vec"].ndim == 2 else given["vec"][:, -1:]
            img = given["img"]
            img[:, given["img_offset"] :] += 0.1 * vector.to(img.dtype) + 0.02 * given["x"].mean()
            return given
        if self.kind == "attn1_patch":
            return 1.3 * given["x"] + 0.1 * (given["q"] - given["k"]).flatten(2)
        return given["x"] * (0.9 + 0.05 * options["block_index"])


def patched(model: Any, kind: str) -> tuple[Any, Recorder]:
    recorder, clone = Recorder(kind), model.clone()
    clone.set_model_patch(recorder, kind)
    return clone, recorder


def one_at_a_time(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_pack.memory.plan.plan import PlanError

    plan = engine.plan

    def small(work: Any, options: Any = None) -> Any:
        if work.batch > 1:
            raise PlanError("too much")
        return plan(work, options)

    monkeypatch.setattr(engine, "plan", small)


def assert_same(got: Any, want: Any, name: str) -> None:
    if isinstance(want, Tensor):
        assert got.shape == want.shape, name
        assert relative_error(got.float(), want.float()) < BOUND, name
    else:
        assert got == want, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_patch_is_given_what_core_gives(models: Path, variant: str, kind: str) -> None:
    in_core(kind)
    path = save(models, variant)
    conditions = prompts(**VARIANTS[variant]())
    results, recorders = [], []
    for model in (ours(path), core(path)):
        clone, recorder = patched(model, kind)
        results.append(sample(clone, *conditions, empty_latent(), steps=2))
        recorders.append(recorder)
    plain = sample(ours(path), *conditions, empty_latent(), steps=2)
    error, effect = relative_error(*results), relative_error(results[0], plain)
    print(f"{kind} on {variant}: effect {effect:.2e}, relative error to core's {error:.2e}")
    assert error < BOUND
    assert effect > 10 * BOUND
    assert len(recorders[0].seen) == len(recorders[1].seen) > 0
    for got, want in zip(recorders[0].seen, recorders[1].seen, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert_same(got[name], want[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_run_one_sample_at_a_time_has_its_own_view(
    models: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = save(models, "t2v")
    model = ours(path)
    clone, _ = patched(model, kind)
    expected = sample(clone, *prompts(), empty_latent(batch=2), steps=1)
    model.engine.release()
    one_at_a_time(model.engine, monkeypatch)
    clone, recorder = patched(model, kind)
    got = sample(clone, *prompts(), empty_latent(batch=2), steps=1)
    assert model.engine.streamed.plan.work.batch == 1
    tokens = {tuple(kept["img" if kind == "double_block" else "x"].shape) for kept in recorder.seen}
    assert tokens == {(1, 72, 256)}
    if kind == "double_block":
        assert {kept["x"].shape[0] for kept in recorder.seen} == {1}
    else:
        assert torch.allclose(got, expected, atol=1e-4)


def test_a_replaced_block_is_given_what_core_gives(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(models, "t2v")
    seen: list[dict[str, Any]] = []

    def replace(given: dict[str, Any], original: dict[str, Any]) -> dict[str, Tensor]:
        conditions = list(given["transformer_options"]["cond_or_uncond"])
        seen.append({"vec": given["vec"].clone(), "img": given["img"].clone(), "conditions": conditions})
        return original["original_block"]({**given, "img": 0.5 * given["img"]})

    results, kept = [], []
    for model in (ours(path), core(path)):
        clone = model.clone()
        clone.set_model_patch_replace(replace, "dit", "double_block", 2)
        results.append(sample(clone, *prompts(), empty_latent(), steps=2))
        kept.append(seen.copy())
        seen.clear()
    assert relative_error(*results) < BOUND
    for got, want in zip(*kept, strict=True):
        for name in want:
            assert_same(got[name], want[name], name)

    model = ours(path)
    model.engine.release()
    one_at_a_time(model.engine, monkeypatch)
    clone = model.clone()
    clone.set_model_patch_replace(replace, "dit", "double_block", 2)
    assert relative_error(sample(clone, *prompts(), empty_latent(), steps=2), results[1]) < BOUND
    assert [given["conditions"] for given in seen] == [
        [condition] for given in kept[0] for condition in given["conditions"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_outside_compiled_code(models: Path, kind: str) -> None:
    from lowvram_pack.nodes.compile import TorchCompileSettings
    from test_nodes import COMPILE

    torch._dynamo.reset()
    model = ours(save(models, "t2v"))
    expected = sample(patched(model, kind)[0], *prompts(), empty_latent(), steps=2)
    compiled = TorchCompileSettings.execute(model, **(COMPILE | {"backend": "eager"})).result[0]
    clone, recorder = patched(compiled, kind)
    torch._dynamo.utils.counters.clear()
    got = sample(clone, *prompts(), empty_latent(), steps=1)
    once = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got = sample(clone, *prompts(), empty_latent(), steps=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == once
    assert recorder.seen
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("kind", ["attn1_output_patch", "attn2_output_patch", "post_input"])
def test_a_patch_without_a_place_is_refused_in_one_line(models: Path, kind: str) -> None:
    clone, recorder = patched(ours(save(models, "t2v")), kind)
    with pytest.raises(ValueError, match=f"patches this model with {kind}.*LowVRAM loader.*ComfyUI's own") as error:
        sample(clone, *prompts(), empty_latent())
    assert "\n" not in str(error.value)
    assert not recorder.seen


def test_attention_of_other_networks_blocks_is_refused_in_one_line(models: Path) -> None:
    model = ours(save(models, "t2v"))
    clone = model.clone()
    clone.set_model_attn1_replace(lambda *_: None, "middle", 0, 0)
    with pytest.raises(ValueError, match="patches this model with attn1,"):
        sample(clone, *prompts(), empty_latent())
    assert sample(model, *prompts(), empty_latent()).isfinite().all()


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_an_attention_override_is_called_as_in_cores_model(models: Path, variant: str) -> None:
    path, seen = save(models, variant), {"ours": [], "core": []}

    def sampled(name: str, model: Any) -> Tensor:
        def override(run: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any) -> Tensor:
            exact = named.get("low_precision_attention", True)
            seen[name].append((q.shape, k.shape, heads, exact, named["transformer_options"]["block_index"]))
            return run(q, k * 0.7, v, heads, **named)

        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
        given = {"clip_vision_output": None, "concat_latent_image": torch.zeros(1, 16, *LATENT_SIZE)}
        return sample(clone, *prompts(**(given if variant == "i2v" else {})), empty_latent(), steps=2)

    got, want = sampled("ours", ours(path)), sampled("core", core(path))
    assert relative_error(got, want) < 1e-5
    assert relative_error(got, sample(ours(path), *prompts(), empty_latent(), steps=2)) > 1e-4
    if variant == "t2v":
        assert sorted(map(str, seen["ours"])) == sorted(map(str, seen["core"]))


class StandInVAE:
    def encode(self, frames: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(1, 16, (frames.shape[0] - 1) // 4 + 1, 8, 12, generator=generator)

    def temporal_compression_decode(self) -> int:
        return 4

    def spacial_compression_encode(self) -> int:
        return 8


def test_uni3c_steers_as_with_cores_model(models: Path) -> None:
    uni3c = pytest.importorskip("comfy.ldm.wan.uni3c")
    import comfy.ops
    from comfy_extras.nodes_model_patch import WanUni3CControlnetApply

    torch.manual_seed(2)
    network = uni3c.WanUni3CControlnet(
        conv_out_dim=256, dim=256, ffn_dim=384, num_heads=2, num_layers=3, time_embed_dim=256, out_proj_dim=256,
        mid_channels=8, dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for tensor in network.parameters():
        torch.nn.init.normal_(tensor, std=0.05)
    device = torch.device("cpu")
    control = comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=device)
    path = save(models, "t2v")
    video = torch.rand(9, 64, 96, 3, generator=torch.Generator().manual_seed(3))
    results = []
    for model in (ours(path), core(path)):
        (steered,) = WanUni3CControlnetApply().apply_patch(model, control, StandInVAE(), video, 1.0, 0.0, 1.0)
        results.append(sample(steered, *prompts(), empty_latent()))
    effect = relative_error(results[0], sample(ours(path), *prompts(), empty_latent()))
    print(f"Uni3C: effect {effect:.2e}, relative error to core's {relative_error(*results):.2e}")
    assert effect > 10 * BOUND
    assert relative_error(*results) < BOUND
