"""Several GPUs in a real ComfyUI, all of them the CPU: the same video, what plan and report show, and whose room it is.

Two threads of one processor stand for two cards; what ComfyUI asks of a second card is asked by its own calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from comfy.sd import load_lora_for_models
from lowvram_pack.nodes.bridge import host
from lowvram_pack.nodes.bridge.card_patcher import CardPatcher, card_patchers
from lowvram_pack.nodes.plan import VramPlan
from lowvram_pack.nodes.report import MemoryReport
from lowvram_pack.nodes.several_gpus import SeveralGPUs
from test_native_nodes import lora
from tiny_models import empty_latent, ours, prompts, sample, save

pytestmark = pytest.mark.newest
OTHER, PARKED = torch.device("cuda", 1), torch.device("cpu", 1)


@pytest.fixture(autouse=True)
def nothing_loaded() -> Any:
    mm.unload_all_models()
    yield
    mm.unload_all_models()


def on_cards(model: Any, devices: str = "cpu,cpu", mode: str = "auto", park: str = "") -> Any:
    return SeveralGPUs.execute(model, devices, mode, park).result[0]


def parked(model: Any, park: str = "cpu:1,50%;cpu,*") -> Any:
    return on_cards(model, mode="park blocks", park=park)


def run(model: Any, **changes: Any) -> torch.Tensor:
    return sample(model, *prompts(), empty_latent(), **changes)


@pytest.mark.parametrize("devices", ["cpu,cpu", "cpu,cpu,cpu"])
def test_the_video_of_one_card(models: Path, devices: str) -> None:
    """Of two cards each has one of the two prompts, as core batches them; three share the tokens of both."""
    path = save(models, "t2v")
    model = on_cards(ours(path), devices)
    got = run(model)
    assert model.engine.streamed.several.num_cards == len(devices.split(","))
    # in one batch of both prompts products have other sizes than one by one, on one card as on several
    torch.testing.assert_close(got, run(ours(path)), rtol=1e-4, atol=1e-4)


def test_prompts_in_turn_are_bit_for_bit_one_card_s(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(models, "t2v")
    model, alone = on_cards(ours(path)), ours(path)
    monkeypatch.setattr(type(model), "get_free_memory", lambda *a: 0.0)
    monkeypatch.setattr(type(model.model), "memory_required", lambda *a, **k: 1e18)
    assert torch.equal(run(model), run(alone))


def test_a_model_s_loras_are_on_every_card(models: Path) -> None:
    """Those of a LoRA loader before the node and after it, with one strength and another."""
    path = save(models, "t2v")
    alone, several = ours(path), on_cards(ours(path))
    for strength in (0.8, 0.3):
        want, got = (run(load_lora_for_models(model, None, lora(), strength, 0)[0]) for model in (alone, several))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, run(alone), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(run(on_cards(load_lora_for_models(alone, None, lora(), 0.3, 0)[0])), got)


def test_clones_have_cards_of_their_own(models: Path) -> None:
    """One engine goes from two cards to one and back, as graphs ask for it."""
    alone = ours(save(models, "t2v"))
    model = on_cards(alone)
    first = run(model)
    assert alone.engine is model.engine and model.engine.streamed.several is not None
    run(alone)
    assert model.engine.streamed.several is None
    assert torch.equal(run(model), first)


def test_plan_and_report_show_each_card(models: Path) -> None:
    model = on_cards(ours(save(models, "t2v")))
    plan = VramPlan.execute(model, 832, 480, 81, True, 8.0).result[1]
    assert "on 2 cards" in plan and "each card" in plan
    assert len([line for line in plan.splitlines() if line.startswith("  cpu ")]) == 2 and "7.50 GiB" in plan
    run(model)
    assert "cpu beside it: VRAM peak" in MemoryReport.execute(model).result[0]


def test_one_gpu_makes_it_alone(models: Path) -> None:
    model = on_cards(ours(save(models, "t2v")), "auto")
    assert model.options.others == ()


@pytest.mark.parametrize(("devices", "said"), [("cpu,", "name devices with commas"), ("gpu:0", "does not exist")])
def test_lists_that_are_none_are_refused(models: Path, devices: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        on_cards(ours(save(models, "t2v")), devices)


def test_nodes_that_see_all_tokens_are_refused(models: Path) -> None:
    model = on_cards(ours(save(models, "t2v")))
    override = model.clone()
    override.model_options["transformer_options"]["optimized_attention_override"] = lambda own, *a, **k: own(*a, **k)
    with pytest.raises(ValueError, match="several GPUs have some each: take that node"):
        run(override)
    patched = model.clone()
    patched.set_model_patch(lambda arguments: arguments["x"], "attn2_patch")
    with pytest.raises(ValueError, match="use a single device, or take that node out"):
        run(patched)


def test_core_knows_what_another_card_holds_and_gets_it_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_cards(ours(save(models, "t2v")))
    engine = model.engine
    (card,) = cards = card_patchers(engine, (OTHER,))
    assert card_patchers(engine, (OTHER, engine.device)) == cards, "one for a card"
    model.set_additional_models("lowvram_cards", cards)
    assert model.clone().get_additional_models() == cards
    monkeypatch.setattr(
        mm, "get_free_memory", lambda device, torch_free_too=False: (2**34, 0) if torch_free_too else 2**34
    )
    run(model)
    monkeypatch.setattr(type(engine), "bytes_on", lambda self, device: self.device_bytes if device == OTHER else 0)
    assert card.loaded_size() == engine.device_bytes > 0
    loaded = [each for each in mm.current_loaded_models if each.model is card]
    assert [each.device for each in loaded] == [OTHER], "core loaded it with the MODEL"
    assert host._others(model.model, OTHER) == [], "what runs with the model is none of the others"
    assert loaded[0].model_unload(1e30)
    assert not engine.streamed.started and card.loaded_size() == 0
    mm.current_loaded_models[:] = [each for each in mm.current_loaded_models if each.model is not card]
    assert isinstance(card, CardPatcher) and torch.isfinite(run(model)).all()


def test_parked_blocks_make_the_same_video(models: Path) -> None:
    path = save(models, "t2v")
    model = parked(ours(path))
    assert torch.equal(run(model), run(ours(path)))
    engine = model.engine
    assert engine.bytes_on(PARKED) == 2 * engine.streamed.weights.layouts[0].nbytes
    by_hand = model.with_options(blocks_to_swap=4)
    assert "2 blocks are parked on cpu:1" in VramPlan.execute(by_hand, 832, 480, 81, True, 8.0).result[1]
    assert "Nothing is parked on another card" in VramPlan.execute(model, 832, 480, 81, True, 8.0).result[1]
    assert "parked on cpu:1: 2 blocks" in MemoryReport.execute(model).result[0]


def test_cards_that_share_steps_may_park_too(models: Path) -> None:
    path = save(models, "t2v")
    model = on_cards(ours(path), mode="split the video", park="cpu:1,50%;cpu,*")
    assert torch.equal(run(model), run(on_cards(ours(path))))
    engine = model.engine
    assert engine.bytes_on(PARKED) == 2 * engine.streamed.weights.layouts[0].nbytes
    report = MemoryReport.execute(model).result[0]
    assert "cpu beside it: VRAM peak" in report and "parked on cpu:1: 2 blocks" in report


def test_core_gets_parked_memory_back_between_steps(models: Path) -> None:
    """Another node's model wants the card in the middle of a run: the rest of it has the blocks from RAM."""
    path = save(models, "t2v")
    model = parked(ours(path))
    (card,) = model.get_additional_models()
    assert isinstance(card, CardPatcher) and card.load_device == PARKED
    freed: list[float] = []

    def wants_the_card(arguments: dict[str, Any]) -> torch.Tensor:
        if not freed:
            freed.append(card.partially_unload(host.CPU, 1e30))
        return arguments["denoised"]

    model.set_model_sampler_post_cfg_function(wants_the_card)
    got = run(model)
    assert freed[0] > 0 and torch.equal(got, run(ours(path)))
    assert mm.loaded_models() != []


def test_a_pass_keeps_what_is_parked(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parked(ours(save(models, "t2v")))
    (card,) = model.get_additional_models()
    freed: list[float] = []
    monkeypatch.setattr(host, "stop_if_interrupted", lambda: freed.append(card.partially_unload(host.CPU, 1e30)))
    streamed = model.engine.streamed
    streamed.between_blocks = host.stop_if_interrupted
    run(model)
    assert freed and not any(freed) and card.loaded_size() > 0


def test_parked_memory_goes_when_the_node_is_taken_out(models: Path) -> None:
    alone = ours(save(models, "t2v"))
    first = run(parked(alone))
    assert alone.engine.bytes_on(PARKED) > 0
    assert torch.equal(run(alone), first) and alone.engine.bytes_on(PARKED) == 0


@pytest.mark.parametrize(
    ("park", "said"),
    [("cpu:1", "no place with an amount"), ("cuda:1,8gb", "device 'cuda:1'"), ("cpu:1,0gb", "no amount")],
)
def test_damaged_lists_are_refused_by_the_node(models: Path, park: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parked(ours(save(models, "t2v")), park)


def test_two_models_park_in_turn(models: Path) -> None:
    """Such as two experts: the one that runs has the room."""
    high, low = (parked(ours(save(models, "t2v", seed=seed))) for seed in (0, 1))
    for model in (high, low, high):
        run(model)
        assert model.engine.bytes_on(PARKED) > 0
    assert low.engine.bytes_on(PARKED) == 0
