"""Our MODEL under core's memory management: loaded when it runs, given back when asked."""

from __future__ import annotations

import gc
import statistics
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import psutil
import pytest
import torch
from lowvram_pack.nodes.block_swap import BlockSwap
from lowvram_pack.nodes.bridge import host
from lowvram_pack.nodes.bridge.patcher import StreamedModelPatcher
from test_native_nodes import lora
from tiny_models import core, empty_latent, ours, prompts, sample, save

SWAP = {"blocks_to_swap": -1, "vram_budget_gb": 0.0, "prefetch": 0, "ram_budget_gb": 0.0, "pinned_memory": True}


@pytest.fixture(autouse=True)
def nothing_loaded() -> Any:
    mm.unload_all_models()
    yield
    mm.unload_all_models()


def streamed_from_disk(model: Any) -> Any:
    """RAM for the process and three of the four blocks: the CPU takes the part of a device that weights travel to."""
    return BlockSwap.execute(model, **(SWAP | {"ram_budget_gb": 1.5 + 10 / 1024})).result[0]


def test_nothing_is_loaded_before_the_first_pass(models: Path) -> None:
    model = ours(save(models, "t2v"))
    assert model.loaded_size() == 0
    assert model.engine.streamed.host_bytes == 0
    mm.load_models_gpu([model])
    assert model.loaded_size() == 0


def test_core_sees_what_is_loaded_and_gets_it_back(models: Path) -> None:
    model = ours(save(models, "t2v"))
    sample(model, *prompts(), empty_latent())
    assert model in mm.loaded_models()
    assert model.loaded_size() > 0
    assert model.loaded_size() == model.model.model_loaded_weight_memory
    assert model.model.device == model.load_device == model.current_loaded_device()
    mm.unload_all_models()
    assert mm.loaded_models() == []
    assert model.loaded_size() == model.model.model_loaded_weight_memory == 0
    assert not model.engine.streamed.started
    assert all(parameter.is_meta for parameter in model.model.diffusion_model.parameters())


def test_a_part_is_given_back_on_request(models: Path) -> None:
    model = ours(save(models, "t2v"))
    first = sample(model, *prompts(), empty_latent())
    loaded = model.loaded_size()
    assert model.partially_unload(model.offload_device, 1) == loaded
    assert model.loaded_size() == 0
    assert torch.equal(sample(model, *prompts(), empty_latent()), first)


def test_a_second_run_uploads_nothing(models: Path) -> None:
    model = ours(save(models, "t2v"))
    sample(model, *prompts(), empty_latent())
    streamer = model.engine.streamed.streamer
    sample(model.clone(), *prompts(), empty_latent())
    assert model.engine.streamed.streamer is streamer


def test_the_plan_follows_the_size(models: Path) -> None:
    model = ours(save(models, "t2v"))
    sample(model, *prompts(), empty_latent())
    small = model.engine.streamed.plan.work
    sample(model, *prompts(), empty_latent(size=(5, 8, 16)))
    large = model.engine.streamed.plan.work
    assert (small.frames, small.height, small.width) == (9, 64, 96)
    assert (large.frames, large.height, large.width) == (17, 64, 128)


@pytest.mark.parametrize("ram", ["much", "little"])
def test_an_interrupt_takes_effect_between_blocks_and_keeps_what_was_read(
    models: Path, monkeypatch: pytest.MonkeyPatch, ram: str
) -> None:
    """VRAM and pinned memory are given back; the weights stay in RAM where much of it is free."""
    model = ours(save(models, "t2v"))
    expected = sample(model, *prompts(), empty_latent())
    held = model.engine.streamed.host_bytes
    if ram == "little":
        monkeypatch.setattr(host, "free_ram", lambda: model.engine.total_bytes)
    network = model.model.diffusion_model
    blocks_run: list[str] = []
    forward = type(network.blocks[0]).forward

    def counting(self: Any, *arguments: Any) -> None:
        blocks_run.append("block")
        if len(blocks_run) == 6:  # the second of the second pass's
            mm.interrupt_current_processing()
        forward(self, *arguments)

    monkeypatch.setattr(type(network.blocks[0]), "forward", counting)
    with pytest.raises(mm.InterruptProcessingException):
        sample(model, *prompts(), empty_latent())
    assert len(blocks_run) == 6
    streamed = model.engine.streamed
    assert not streamed.started
    assert streamed.pinned_bytes == model.loaded_size() == 0
    assert streamed.host_bytes == (held if ram == "much" else 0) and held > 0
    monkeypatch.undo()
    assert blocks_read_by(lambda: sample(model, *prompts(), empty_latent()), monkeypatch) == (0 if ram == "much" else 4)
    assert torch.equal(sample(model, *prompts(), empty_latent()), expected)


def blocks_read_by(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks are read from their file meanwhile."""
    from lowvram_pack.weights.files.checkpoint import Checkpoint

    read: set[str] = set()
    read_into = Checkpoint.read_into

    def noting(self: Any, name: str, out: torch.Tensor) -> None:
        read.update(name.split(".")[1:2] if name.startswith("blocks.") else ())
        read_into(self, name, out)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_into", noting)
        work()
    return len(read)


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
)
def test_a_full_device_costs_no_weights_in_ram(models: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Not where even the leanest plan ran out of memory: what was read is not to blame."""
    model = ours(save(models, "t2v"))
    sample(model, *prompts(), empty_latent())
    held = model.engine.streamed.host_bytes

    def failing(self: Any, *arguments: Any) -> None:
        raise (torch.cuda.OutOfMemoryError if "Tried" in message else RuntimeError)(message)

    monkeypatch.setattr(type(model.model.diffusion_model.blocks[0]), "forward", failing)
    with pytest.raises(RuntimeError):
        sample(model, *prompts(), empty_latent())
    streamed = model.engine.streamed
    assert not streamed.started and model.loaded_size() == streamed.pinned_bytes == 0
    assert streamed.host_bytes == held > 0


def test_an_error_returns_memory(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save(models, "t2v"))
    expected = sample(model, *prompts(), empty_latent())

    def failing(self: Any, *arguments: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(type(model.model.diffusion_model.blocks[0]), "forward", failing)
    with pytest.raises(RuntimeError, match="broken"):
        sample(model, *prompts(), empty_latent())
    assert model.engine.streamed.host_bytes == model.loaded_size() == 0
    monkeypatch.undo()
    assert torch.equal(sample(model, *prompts(), empty_latent()), expected)


def test_dropping_the_model_frees_it(models: Path) -> None:
    model = ours(save(models, "t2v"))
    sample(model, *prompts(), empty_latent())
    engine = weakref.ref(model.engine)
    clone = weakref.ref(model.clone())
    gc.collect()
    assert clone() is None
    assert model.engine.streamed.started, "a clone's end leaves the others alone"
    del model
    gc.collect()
    assert engine() is None
    mm.cleanup_models()


def test_memory_is_flat_when_two_workflows_alternate(models: Path) -> None:
    from lowvram_pack.system.host_memory import return_freed_bytes

    ones = ours(save(models, "t2v")), ours(save(models, "i2v22")), core(save(models, "t2v"))
    seen = []
    for _ in range(10):
        for model in ones:
            sample(model, *prompts(), empty_latent(), steps=1)
        gc.collect()
        return_freed_bytes()  # else 40 MiB that C's allocator has freed are counted in some rounds and not in others
        seen.append(psutil.Process().memory_info().rss / 2**20)
    print(f"RSS in MiB after each of ten rounds: {', '.join(f'{size:.0f}' for size in seen)}")
    assert statistics.median(seen[7:]) - statistics.median(seen[2:5]) < 15


def test_models_of_one_layout_have_one_models_ram(models: Path) -> None:
    """Wan 2.2's experts: each is read over the other, also where both had room; options and results are their own."""
    ones = [ours(save(models, "t2v")), ours(save(models, "t2v", seed=3))]
    engines = [model.engine for model in ones]
    expected = [sample(model, *prompts(), empty_latent()) for model in ones]
    one = max(engine.streamed.host_bytes for engine in engines)
    for _ in range(2):
        for model, latent in zip(ones, expected, strict=True):
            assert torch.equal(sample(model, *prompts(), empty_latent()), latent)
            assert [engine.streamed.host_bytes > 0 for engine in engines] == [each is model for each in ones]
            assert sum(engine.streamed.host_bytes for engine in engines) == one
            assert all(other.loaded_size() == other.model.model_loaded_weight_memory for other in ones)


def test_experts_with_a_lora_are_planned_for_what_the_other_leaves(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose host memory a model takes depends on its LoRAs, which it has before it is planned."""
    tensors = {name: tensor for name, tensor in lora().items() if not name.endswith("diff_b")}
    first, second = (
        comfy.sd.load_lora_for_models(ours(save(models, "t2v", seed=seed)), None, tensors, 0.8, 0)[0] for seed in (0, 3)
    )
    sample(first, *prompts(), empty_latent())
    plan, was_started = second.engine.plan, []

    def planned(*arguments: Any) -> Any:
        was_started.append(first.engine.streamed.started)
        return plan(*arguments)

    monkeypatch.setattr(second.engine, "plan", planned)
    sample(second, *prompts(), empty_latent())
    assert was_started == [False], "what the other had of the device counts as free"
    assert first.engine.streamed.host_bytes == 0


def test_memory_of_a_model_whose_run_goes_on_stays_its_own(models: Path) -> None:
    """As where a guider asks two models in every step."""
    first, second = ours(save(models, "t2v")), ours(save(models, "t2v", seed=3))
    sample(first, *prompts(), empty_latent())
    held = first.engine.streamed.host_bytes
    first.engine.begin_run()
    sample(second, *prompts(), empty_latent())
    assert first.engine.streamed.host_bytes == second.engine.streamed.host_bytes == held > 0
    first.engine.end_run()


def test_a_failure_while_a_model_takes_anothers_ram_leaves_neither(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram_pack.nodes import loaders
    from lowvram_pack.runtime.turns import Turns
    from lowvram_pack.weights.files.checkpoint import Checkpoint

    monkeypatch.setattr(loaders, "TURNS", Turns())  # an idle model of another test of this process gives nothing
    ones = [ours(save(models, "t2v")), ours(save(models, "t2v", seed=3))]
    expected = [sample(model, *prompts(), empty_latent()) for model in ones]
    read_into = Checkpoint.read_into

    def failing(self: Any, name: str, out: torch.Tensor) -> None:
        if name.startswith("blocks.2."):
            raise mm.InterruptProcessingException
        read_into(self, name, out)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_into", failing)
        with pytest.raises(mm.InterruptProcessingException):
            sample(ones[0], *prompts(), empty_latent())
    assert all(model.engine.streamed.host_bytes == 0 for model in ones)
    for model, latent in zip(ones, expected, strict=True):
        assert torch.equal(sample(model, *prompts(), empty_latent()), latent)


@pytest.mark.parametrize("variant", ["t2v", "vace"])
def test_streaming_from_disk_gives_the_same(models: Path, variant: str) -> None:
    model = ours(save(models, variant))
    expected = sample(model, *prompts(), empty_latent())
    from_disk = streamed_from_disk(model)
    got = sample(from_disk, *prompts(), empty_latent())
    assert model.engine.streamed.plan.host.from_disk
    assert torch.equal(got, expected)
    assert torch.equal(sample(model, *prompts(), empty_latent()), expected), "options belong to the clone"


@pytest.mark.parametrize(("state", "streamed"), [("HIGH_VRAM", 0), ("LOW_VRAM", 4), ("NO_VRAM", 4)])
def test_cores_flags_decide_what_is_resident(
    models: Path, monkeypatch: pytest.MonkeyPatch, state: str, streamed: int
) -> None:
    model = ours(save(models, "t2v"))
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState[state])
    assert model.engine.room.limits(model.options).blocks_to_swap == streamed
    by_hand = model.with_options(blocks_to_swap=2)
    assert model.engine.room.limits(by_hand.options).blocks_to_swap == 2


def test_pinning_follows_core(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 100)
    monkeypatch.setattr(mm, "TOTAL_PINNED_MEMORY", 30)
    assert host.may_pin()
    assert host.pinnable_bytes() == 70
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", -1)  # --disable-pinned-memory
    assert not host.may_pin()
    model = ours(save(models, "t2v")).with_options(prefetch=2)
    mm.load_models_gpu([model])
    assert model.engine.room.limits(model.options).pinned_cap_bytes == 0


def test_options_travel_with_clones(models: Path) -> None:
    model = ours(save(models, "t2v"))
    changed = BlockSwap.execute(model, **(SWAP | {"blocks_to_swap": 3})).result[0]
    assert isinstance(changed, StreamedModelPatcher)
    assert changed.clone().options.blocks_to_swap == 3
    assert model.options.blocks_to_swap == -1
    assert changed.is_clone(model)


def test_a_core_model_is_explained_or_passed(models: Path) -> None:
    model = core(save(models, "t2v"))
    with pytest.raises(ValueError, match="Load Wan Video Model"):
        BlockSwap.execute(model, **SWAP)
    assert BlockSwap.execute(model, **SWAP, pass_other_models=True).result[0] is model


def test_work_that_does_not_fit_says_what_would(models: Path) -> None:
    model = BlockSwap.execute(ours(save(models, "t2v")), **(SWAP | {"ram_budget_gb": 1.0})).result[0]
    with pytest.raises(ValueError, match="Raise the RAM budget to at least") as error:
        sample(model, *prompts(), empty_latent())
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_fit_runs_sample_by_sample(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram_pack.memory.plan.plan import PlanError

    model = ours(save(models, "t2v"))
    expected = sample(model, *prompts(), empty_latent(batch=2))
    engine = model.engine
    engine.release()
    plan = engine.plan

    def small(work: Any, options: Any = None) -> Any:
        if work.batch > 1:
            raise PlanError("too much")
        return plan(work, options)

    monkeypatch.setattr(engine, "plan", small)
    got = sample(model, *prompts(), empty_latent(batch=2))
    assert engine.streamed.plan.work.batch == 1
    assert torch.allclose(got, expected, atol=1e-4)


def test_bad_input_is_one_line(models: Path) -> None:
    model = ours(save(models, "t2v"))
    with pytest.raises(ValueError, match="has 4 blocks"):
        BlockSwap.execute(model, **(SWAP | {"blocks_to_swap": 5}))
    (models / "broken.safetensors").write_bytes(b"<html>")
    for name in ("broken.safetensors", "gone.safetensors"):
        with pytest.raises(ValueError) as error:
            ours(models / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="takes video latents of 16 channels"):
        sample(model, *prompts(), {"samples": torch.ones(1, 48, 3, 8, 12)})
    assert sample(model, *prompts(), empty_latent()).isfinite().all()
