"""Resumable Sampling under ComfyUI's samplers: what was stopped anywhere goes on to the same latents, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy_extras.nodes_custom_sampler as custom_sampler
import folder_paths
import pytest
import torch
from lowvram_pack.attention.backend import AttentionWorkspace, BlockChoice
from lowvram_pack.attention.sdpa import Sdpa
from lowvram_pack.nodes.bridge.identity import identity
from lowvram_pack.nodes.bridge.wan_engine import WanEngine
from lowvram_pack.nodes.resumable import ResumableSampling
from lowvram_pack.nodes.sparse import SparseAttention
from lowvram_pack.runtime import attending
from tiny_models import core, empty_latent, ours, prompts, sample, save

import nodes

SAMPLERS = ("euler", "uni_pc", "dpmpp_2m", "dpmpp_sde", "lcm", "res_multistep")
# whose functions look into guidance, or that draw noise in yet another way
MORE_SAMPLERS = ("euler_ancestral_cfg_pp", "res_multistep_cfg_pp", "dpmpp_2m_sde", "heun", "uni_pc_bh2", "ddim")
STEPS = 4


class Crash(RuntimeError):
    """As a card that falls off the bus."""


@pytest.fixture(autouse=True)
def output(tmp_path: Path) -> Iterator[Path]:
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


class Passes:
    """Counts the model's passes, and stops at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop_at = 0, -1
        self.stop: Callable[[], object] = mm.interrupt_current_processing
        run = WanEngine.run

        def counted(engine: Any, *arguments: Any) -> torch.Tensor:
            if self.count == self.stop_at:
                self.stop()
            velocity = run(engine, *arguments)
            self.count += 1
            return velocity

        monkeypatch.setattr(WanEngine, "run", counted)

    def stopped(self, at: int, make: Callable[[], object], stop: Callable[[], object] | None = None) -> None:
        """Interrupt `make` in this pass of it."""
        self.count, self.stop_at, self.stop = 0, at, stop or mm.interrupt_current_processing
        with pytest.raises((mm.InterruptProcessingException, Crash)):
            make()
        assert self.count == at
        self.count, self.stop_at = 0, -1


def resumable(path: Path) -> Any:
    """As after a restart: nothing is left of a loader before."""
    return ResumableSampling.execute(ours(path)).result[0]


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("sampler", SAMPLERS + MORE_SAMPLERS)
def test_a_sampler_goes_on_bit_for_bit(models: Path, passes: Passes, sampler: str) -> None:
    path = save(models, "t2v")

    def make(model: Any) -> torch.Tensor:
        return sample(model, *prompts(), empty_latent(), sampler_name=sampler, steps=STEPS)

    whole = make(ours(path))
    total, passes.count = passes.count, 0
    at = total - 1
    passes.stopped(at, lambda: make(resumable(path)))
    assert torch.equal(make(resumable(path)), whole)
    assert passes.count <= max(2, total - at + 1), "what is recorded was made again"


@pytest.mark.parametrize(("at", "how"), [(0, "cancel"), (1, "crash"), (2, "cancel"), (3, "crash")])
def test_it_goes_on_from_anywhere(models: Path, passes: Passes, at: int, how: str) -> None:
    path = save(models, "t2v")

    def make(model: Any) -> torch.Tensor:
        return sample(model, *prompts(), empty_latent(), steps=STEPS)

    whole = make(ours(path))
    passes.stopped(at, lambda: make(resumable(path)), crash if how == "crash" else None)
    model = resumable(path)
    assert torch.equal(make(model), whole)
    assert passes.count == STEPS - at  # core has both prompts of a step in one pass here


@pytest.mark.newest
def test_it_goes_on_with_what_sparse_attention_had_learnt(
    models: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a new process, and with a model that has just had another run."""

    class Inexact:
        """Off by a tenth of tau: what the bound learns of it changes the next step."""

        name, workspace = "stand-in", AttentionWorkspace()

        def attend(self, q: Any, k: Any, v: Any, blocks: BlockChoice) -> torch.Tensor:
            return Sdpa(torch.device("cpu")).attend(q, k, v) * (1 + 0.1 * blocks.tau)

    monkeypatch.setattr(attending, "select_sparse", lambda spec: Inexact())
    path = save(models, "t2v")

    def sparse(model: Any) -> Any:
        return SparseAttention.execute(model, "tau", 2.0, 0.1, 0.0, 0, 0).result[0]

    def make(model: Any, seed: int = 5) -> torch.Tensor:
        return sample(model, *prompts(), empty_latent(), steps=STEPS, seed=seed)

    whole = make(sparse(ours(path)))
    assert not torch.equal(whole, make(sparse(ours(path)), seed=6))
    passes.stopped(2, lambda: make(sparse(resumable(path))))
    used = sparse(resumable(path))
    make(used, seed=6)
    passes.count = 0
    assert torch.equal(make(used), whole)
    assert passes.count == STEPS - 2
    passes.stopped(2, lambda: make(sparse(resumable(path)), seed=7))
    assert torch.equal(make(sparse(resumable(path)), seed=7), make(sparse(ours(path)), seed=7))


def test_pausing_gives_all_memory_back_and_goes_on_with_the_same_model(models: Path, passes: Passes) -> None:
    model = resumable(save(models, "t2v"))
    whole = sample(ours(save(models, "t2v")), *prompts(), empty_latent(), steps=STEPS)
    for at in (1, 2):
        passes.stopped(at, lambda: sample(model, *prompts(), empty_latent(), steps=STEPS))
        assert not model.engine.streamed.started and model.engine.device_bytes == 0
        # core never unloads what only a test before still holds
        assert not [loaded for loaded in mm.current_loaded_models if not loaded.is_dead()]
    assert torch.equal(sample(model, *prompts(), empty_latent(), steps=STEPS), whole)


def test_two_experts_go_on_with_the_one_that_was_stopped(models: Path, passes: Passes, output: Path) -> None:
    paths = save(models, "t2v"), save(models, "t2v", seed=1)

    def make(load: Callable[[Path], Any]) -> torch.Tensor:
        latent = empty_latent()
        for path, (first, last) in zip(paths, ((0, 2), (2, 10)), strict=True):
            positive, negative = prompts()
            (latent,) = nodes.KSamplerAdvanced().sample(
                load(path), "enable" if first == 0 else "disable", 3, STEPS, 3.5, "euler", "simple", positive,
                negative, latent, first, last, "enable" if first == 0 else "disable",
            )  # fmt: skip
        return latent["samples"]

    whole = make(ours)
    total, passes.count = passes.count, 0
    passes.stopped(total - 1, lambda: make(resumable))
    assert len(list(output.glob("wan/*/finished.safetensors"))) == 1
    assert torch.equal(make(resumable), whole)
    assert passes.count < total / 2, "the first expert's latents are there"
    passes.count = 0
    assert torch.equal(make(resumable), whole)
    assert passes.count == 0, "finished latents are kept"


@pytest.mark.parametrize("at", [2, None])
def test_sampler_custom_advanced_goes_on_with_both_of_its_outputs(models: Path, passes: Passes, at: int | None) -> None:
    path = save(models, "t2v")

    def make(model: Any) -> list[torch.Tensor]:
        noise = custom_sampler.RandomNoise.execute(3).result[0]
        guider = custom_sampler.BasicGuider.execute(model, prompts()[0]).result[0]
        sampler = custom_sampler.KSamplerSelect.execute("uni_pc").result[0]
        sigmas = custom_sampler.BasicScheduler.execute(model, "beta", STEPS, 1.0).result[0]
        out = custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, empty_latent())
        return [latent["samples"] for latent in out.result]

    whole = make(ours(path))
    if at is None:  # a run that was finished
        make(resumable(path))
        passes.count = 0
    else:
        passes.stopped(at, lambda: make(resumable(path)))
    again = make(resumable(path))
    assert all(torch.equal(one, other) for one, other in zip(again, whole, strict=True))
    assert passes.count == (0 if at is None else STEPS - at + (passes.count > STEPS - at))


@pytest.mark.newest
@pytest.mark.parametrize(
    "change", ["seed", "cfg", "prompt", "steps", "sampler_name", "scheduler", "model", "shift", "lora", "latent"]
)
def test_another_run_takes_nothing_up(models: Path, passes: Passes, change: str) -> None:
    from test_native_nodes import with_lora, with_shift

    path = save(models, "t2v")
    passes.stopped(3, lambda: sample(resumable(path), *prompts(), empty_latent(), steps=STEPS))
    other = {"seed": 6, "cfg": 2.0, "steps": 5, "sampler_name": "dpmpp_2m", "scheduler": "beta"}
    changes = {change: other[change]} if change in other else {}
    changed_path = save(models, "t2v", seed=9) if change == "model" else path
    text = prompts(8 if change == "prompt" else 7)
    latent = empty_latent()
    if change == "latent":
        latent = {"samples": torch.ones_like(latent["samples"])}

    def patched(model: Any) -> Any:
        return {"lora": with_lora, "shift": with_shift}.get(change, lambda model: model)(model)

    settings = {"steps": STEPS, **changes}
    whole = sample(patched(ours(changed_path)), *text, latent, **settings)
    made, passes.count = passes.count, 0
    assert torch.equal(sample(patched(resumable(changed_path)), *text, latent, **settings), whole)
    assert passes.count == made


def test_equal_runs_have_equal_identities_and_others_have_not() -> None:
    def closure(held: object) -> Callable[[], object]:
        return lambda: held

    class Thing:
        def __init__(self, value: object) -> None:
            self.value = value
            self.me = self

    def alike() -> list[object]:
        return [
            torch.ones(2), {"a": [1, (2.5, None)]}, closure(3), closure(torch.zeros(2)), Thing(1), torch.float16,
            torch.nn.Linear(1, 1, bias=False).requires_grad_(False), {1: 2},
        ]  # fmt: skip

    from lowvram_pack.system.content_key import run_key

    def key(value: object) -> str:
        return run_key({"x": identity(value)})

    torch.manual_seed(0)
    first = [key(value) for value in alike()]
    torch.manual_seed(0)
    assert first == [key(value) for value in alike()]
    others = [closure(4), closure(torch.ones(2)), Thing(2), Thing([1]), {"a": [1, 2.5, None]}, lambda: 3]
    assert len({*first, *map(key, others)}) == len(first) + len(others)


def test_what_cannot_be_told_apart_is_not_recorded(
    models: Path, passes: Passes, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(models, "t2v")
    text = prompts(beside=core(path))  # as a node of others may put a model into a conditioning
    whole = sample(ours(path), *text, empty_latent())
    assert torch.equal(sample(resumable(path), *text, empty_latent()), whole)
    assert "this run is not recorded: it has another model beside its own" in caplog.text
    assert not (output / "wan").exists()


def test_a_step_cache_is_said_to_begin_anew(models: Path, passes: Passes, caplog: pytest.LogCaptureFixture) -> None:
    from test_native_nodes import with_easycache

    def make() -> torch.Tensor:
        return sample(with_easycache(resumable(save(models, "t2v"))), *prompts(), empty_latent(), steps=STEPS)

    passes.stopped(2, make)
    assert "EasyCache" not in caplog.text
    make()
    assert "EasyCache begins anew where the run goes on" in caplog.text


@pytest.mark.newest
@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_a_fault_that_passes_costs_the_step_and_is_not_kept(
    models: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad pass at the last step; the steps before are replayed, and no video is black."""
    path = save(models, "t2v")
    whole = sample(ours(path), *prompts(), empty_latent(), steps=STEPS)
    total, passes.count = passes.count, 0
    run, bad = WanEngine.run, [total - 1]

    def faulty(engine: Any, *arguments: Any) -> torch.Tensor:
        velocity = run(engine, *arguments)
        if passes.count - 1 in bad:
            bad.clear()
            return torch.full_like(velocity, value)
        return velocity

    monkeypatch.setattr(WanEngine, "run", faulty)
    assert torch.equal(sample(resumable(path), *prompts(), empty_latent(), steps=STEPS), whole)
    assert "it is sampled anew from the" in caplog.text
    assert passes.count == total + total // STEPS


def test_a_run_that_took_the_safe_path_goes_on_there(
    models: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart too, where the kernel that failed before is right again."""
    from lowvram_pack.attention.sdpa import Sdpa

    class Sick(Sdpa):
        name = "sick"
        factor = float("nan")

        def attend(self, *arguments: Any, **named: Any) -> Any:
            return super().attend(*arguments, **named) * self.factor

    def sick(factor: float) -> Any:
        model = resumable(save(models, "t2v"))
        network, attention = model.engine.streamed.model, Sick(torch.device("cpu"))
        attention.factor = factor
        network.execution = replace(network.execution, attention=attention)
        return model

    def make(model: Any) -> torch.Tensor:
        return sample(model, *prompts(), empty_latent(), steps=STEPS)

    whole = make(ours(save(models, "t2v")))
    passes.count = 0
    passes.stop_at, passes.stop = 4, crash
    with pytest.raises(Crash):
        make(sick(float("nan")))  # two passes tell, then two steps on the safe path
    passes.count, passes.stop_at = 0, -1
    assert torch.equal(make(sick(0.5)), whole)
    assert passes.count < STEPS, "the safe path's steps were kept"


def test_two_of_the_node_are_one(models: Path) -> None:
    path = save(models, "t2v")
    twice = ResumableSampling.execute(resumable(path)).result[0]
    assert torch.equal(
        sample(twice, *prompts(), empty_latent()), sample(ours(path), *prompts(), empty_latent())
    )  # fmt: skip


def test_models_of_other_loaders_are_refused(models: Path) -> None:
    with pytest.raises(ValueError, match=r"Resumable Sampling \(Low VRAM\) works on models of Load Wan Video Model"):
        ResumableSampling.execute(core(save(models, "t2v")))
