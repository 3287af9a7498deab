"""A model on several cards (all of them the CPU): as on one, from one copy of its weights in RAM, whatever happens."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.attention.sparse.run import AttentionRun
from lowvram_video.cli.main import main
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.framepack.footprint import SectionSize
from lowvram_video.framepack.network.model import Frames, History, Prompt, StepNag
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.memory.plan.footprint import WorkSize
from lowvram_video.memory.plan.host_memory import MIN_STAGING
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.plan.plan import MemoryPlan, PlanError
from lowvram_video.memory.plan.table import describe
from lowvram_video.memory.stream.disk_blocks import DiskBlocks
from lowvram_video.memory.stream.host_blocks import HostBlocks
from lowvram_video.memory.stream.layout import Part
from lowvram_video.memory.stream.ring import DeviceRing, ring_bytes
from lowvram_video.memory.stream.shared_blocks import SharedBlocks
from lowvram_video.memory.stream.streamer import BlockStreamer
from lowvram_video.runtime import attending
from lowvram_video.runtime.cards import parse_devices
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.runtime.several import hidden_sizes, plan_shared, seen_of, shared_samples
from lowvram_video.sampling.caching.framepack import TeaCache
from lowvram_video.sampling.caching.moments import Moment
from lowvram_video.sampling.caching.settings import StepCacheSettings
from lowvram_video.sampling.caching.step_cache import StepCache
from lowvram_video.system.card_links import slowest_link
from lowvram_video.system.sizes import in_gb
from lowvram_video.team.exchange import Exchange
from lowvram_video.team.hiding import hiding_sizes
from lowvram_video.team.team import Team
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.transformer.together import CardsTogether
from lowvram_video.wanvideo.footprint import WanWork
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import Extras, Nag, WanModel
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.lora.file import LoraChoice
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .loras import make_factors, save_lora
from .test_pipeline import latent_of
from .test_plan import FP8, LONG_480P
from .test_plan import limits as gpu_limits
from .test_sparse_attention import ALWAYS, Sol
from .test_step_caches import TABLE
from .tiny import randomize, save_files
from .tiny_framepack import save_framepack

CPU = torch.device("cpu")
WORK = WorkSize(9, 64, 96)
REQUEST = WanRequest(
    "a red ball moves left", "two cats", width=48, height=32, num_frames=9, seed=3, num_steps=2, shift=3.0, guidance=4.0
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three heads, which no number of cards here divides."""
    path = tmp_path_factory.mktemp("several") / "wan.safetensors"
    model = randomize(WanModel(WanConfig("t2v", 384, 512, 3, 4, text_dim=32, freq_dim=32)))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("files"), experts=True)


def on_cards(num_cards: int, **settings: Any) -> RunSettings:
    return RunSettings(others=(CPU,) * (num_cards - 1), **settings)


def inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    latent = torch.randn(batch, 16, 3, 8, 12, generator=generator)
    return latent, torch.linspace(700, 300, batch), torch.randn(batch, 6, 32, generator=generator)


def started(path: Path, settings: RunSettings, work: WorkSize = WORK, **limits: Any) -> StreamedWan:
    model = StreamedWan(path, settings)
    model.start_fitting(model.make_plan(work, limits_for(CPU, **limits)))
    return model


class TestPasses:
    @pytest.mark.parametrize(("num_cards", "batch"), [(2, 1), (3, 1), (4, 2), (2, 2), (3, 2)])
    def test_equal_to_one_card(self, file, num_cards, batch):
        with torch.inference_mode():
            alone = started(file, RunSettings())
            samples = batch if num_cards % batch == 0 else 1  # those that have cards of their own
            expected = torch.cat(
                [alone(*part) for part in zip(*(each.chunk(samples) for each in inputs(batch)), strict=True)]
            )
            model = started(file, on_cards(num_cards), replace(WORK, batch=batch))
            for _ in range(2):
                assert model(*inputs(batch)).equal(expected)
        model.release()

    def test_one_copy_in_ram_feeds_all(self, file):
        model = started(file, on_cards(3))
        held = model.weights.held
        assert held is not None and model.several is not None
        for other in model.several.others:
            assert isinstance(other.weights.blocks, SharedBlocks) and other.host_bytes == 0
            assert other.weights.blocks.extents is held.extents
            weight = other.model.blocks[1].ffn[0].weight
            assert weight.data_ptr() == model.model.blocks[1].ffn[0].weight.data_ptr()
        extents = weakref.ref(held)
        model.release()
        del held
        gc.collect()
        assert extents() is None, "another card holds on to the first one's host memory"

    def test_from_the_disk_too(self, file):
        with torch.inference_mode():
            expected = started(file, RunSettings())(*inputs())
            model = StreamedWan(file, on_cards(2))
            plan = model.make_plan(WORK, limits_for(CPU))  # no RAM is too little for its few blocks, but for buffers
            model.start_fitting(replace(plan, host=replace(plan.host, from_disk=True, num_staging=MIN_STAGING)))
            assert all(isinstance(each.weights.blocks, DiskBlocks) for each in (model, *model._others))
            assert model(*inputs()).equal(expected)
        model.release()

    def test_with_loras_whose_strengths_change(self, files, tmp_path):
        lora = LoraChoice(save_lora(tmp_path / "style.safetensors", make_factors()), 0.9)
        made = []
        for settings in (RunSettings(), on_cards(2)):
            model = StreamedWan(files.model, settings, loras=[lora])
            with torch.inference_mode():
                for strength in (0.9, 0.3):
                    model.set_lora_strengths([strength])
                    if not model.started:
                        model.start_fitting(model.make_plan(WORK, limits_for(CPU)))
                    made.append(model(*inputs()))
            model.release()
        assert made[0].equal(made[2]) and made[1].equal(made[3]) and not made[0].equal(made[1])

    @pytest.mark.parametrize(("num_cards", "batch"), [(2, 1), (3, 1), (2, 2)])
    def test_a_negative_prompt_guides_attention_on_every_card(self, file, num_cards, batch):
        latent, timestep, text = inputs(batch)
        negative = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(7))
        work = WanWork(**{each.name: getattr(WORK, each.name) for each in fields(WORK)}, nag=True)
        extras = Extras(nag=Nag(negative, NagSettings()))
        with torch.inference_mode():
            alone = started(file, RunSettings(), work)
            samples = [part for part in zip(*(each.chunk(batch) for each in (latent, timestep, text)), strict=True)]
            expected = torch.cat([alone(*part, extras=extras) for part in samples])
            assert not expected.equal(torch.cat([alone(*part) for part in samples]))
            alone.release()
            model = started(file, on_cards(num_cards), replace(work, batch=batch))
            assert model(latent, timestep, text, extras=extras).equal(expected)
        model.release()

    def test_samples_go_to_cards_of_their_own_first(self, file, monkeypatch):
        """Guidance on two cards exchanges nothing."""

        def refuse(*_: object) -> None:
            raise AssertionError("something was sent")

        with torch.inference_mode():
            alone = started(file, RunSettings())
            expected = torch.cat([alone(*part) for part in zip(*(each.chunk(2) for each in inputs(2)), strict=True)])
            model = started(file, on_cards(2), replace(WORK, batch=2))
            monkeypatch.setattr(Exchange, "send", refuse)
            assert model(*inputs(2)).equal(expected)
        model.release()

    def test_who_shares_a_sample(self):
        assert shared_samples(2, 2) == [(slice(0, 1), (0,)), (slice(1, 2), (1,))]
        assert shared_samples(2, 4) == [(slice(0, 1), (0, 1))] * 2 + [(slice(1, 2), (2, 3))] * 2
        assert shared_samples(2, 3) == [(slice(0, 2), (0, 1, 2))] * 3
        assert shared_samples(1, 2) == [(slice(0, 1), (0, 1))] * 2


class TestStepCaches:
    """A step cache decides on several cards as on one: by all tokens, for all cards that share them."""

    @pytest.mark.parametrize(
        ("num_cards", "batch", "method"),
        [(2, 1, "teacache"), (3, 1, "first_block"), (2, 2, "teacache"), (4, 2, "first_block")],
    )
    def test_equal_to_one_card(self, file, num_cards, batch, method):
        alone, made = (cached_steps(file, *how, method) for how in ((RunSettings(), 1), (on_cards(num_cards), batch)))
        assert [skipped for skipped, _ in made] == [skipped for skipped, _ in alone]
        assert 2 <= sum(skipped for skipped, _ in made) <= 2 * (STEPS - 2)
        assert all(one.equal(other) for (_, one), (_, other) in zip(made, alone, strict=True))

    def test_a_pass_that_failed_on_one_card_is_made_again(self, file, monkeypatch):
        """Out of memory on the second card behind its last block, when the first is done: no half is used."""
        want, left = cached_steps(file, RunSettings(), 1), [3]

        def fails(model: StreamedWan) -> None:
            assert model.several is not None
            head = model.several.others[0].model.head
            project = head.forward

            def full(*arguments: Any) -> Tensor:
                left[0] -= 1
                if left[0] == 0:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
                return project(*arguments)

            monkeypatch.setattr(head, "forward", full)

        made = cached_steps(file, on_cards(2), 1, prepare=fails)
        assert left[0] < 0 and made[0][1].equal(want[0][1])
        assert all(velocity.isfinite().all() for _, velocity in made)


STEPS = 10


@torch.inference_mode()
def cached_steps(
    path: Path, settings: RunSettings, batch: int, method: str = "first_block", prepare: Any = None
) -> list[tuple[int, Tensor]]:
    """Of each step how many of its two prompts were skipped, and both velocities; in turn, or `batch` at once."""
    model = StreamedWan(path, settings)
    threshold = 1.0 if method == "teacache" else 0.35
    model.step_cache = StepCache(StepCacheSettings(method, threshold, 0.0, 1.0), TABLE)
    work = replace(WORK, batch=batch, passes_per_step=2 // batch)
    model.start_fitting(model.make_plan(work, limits_for(CPU)))
    if prepare is not None:
        prepare(model)
    model.begin_steps()
    latent, _, text = inputs(2)
    parts, prompts, made = [slice(first, first + batch) for first in range(0, 2, batch)], ((0, "a"), (1, "b")), []
    for step in range(STEPS):
        model.at_moment(Moment(step / STEPS, (STEPS - 1) / STEPS, STEPS, step))
        time, moved = torch.full((2,), 1000.0 - 40 * step), latent * (1 - 0.02 * step)
        velocity = torch.cat([model(moved[at], time[at], text[at], extras=Extras(prompts=prompts[at])) for at in parts])
        skipped = {each: skips for each, _, skips in model.step_cache.reading().passes}
        made.append((skipped[step], velocity))
    model.release()
    return made


class TestFramePack:
    @pytest.mark.parametrize("cached", [False, True])
    def test_equal_to_one_card(self, tmp_path, cached):
        path = save_framepack(tmp_path / "framepack.safetensors")
        expected, made = (framepack_steps(path, settings, cached) for settings in (RunSettings(), on_cards(2)))
        assert all(one.equal(other) for one, other in zip(made, expected, strict=True))

    def test_a_step_that_failed_on_one_card_is_made_again(self, tmp_path, monkeypatch):
        """Out of memory on the second card behind its last exchange, when the first is done: no half is added."""
        path, left = save_framepack(tmp_path / "framepack.safetensors"), [1]

        def fails(model: StreamedFramePack) -> None:
            assert model.several is not None
            network = model.several.others[0].model
            run_blocks = network.run_blocks

            def full(*arguments: Any) -> Iterator[None]:
                yield from run_blocks(*arguments)
                if left and left.pop():
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")

            monkeypatch.setattr(network, "run_blocks", full)

        made = framepack_steps(path, on_cards(2), True, prepare=fails)
        want = framepack_steps(path, RunSettings(), True)
        assert not left and all(one.equal(other) for one, other in zip(made, want, strict=True))

    def test_no_card_keeps_what_a_step_cache_added_when_the_model_stops(self, tmp_path):
        """Neither the one that decides: cards of which only some have it would not skip the same passes."""
        kept: dict[TeaCache, Any] = {}

        def hold(model: StreamedFramePack) -> None:
            assert model.several is not None
            model.several.others[0]._followed = kept  # type: ignore[assignment] # whose caches outlast the run

        framepack_steps(save_framepack(tmp_path / "framepack.safetensors"), on_cards(2), True, prepare=hold)
        assert [(first.residual, second.residual) for first, second in kept.items()] == [(None, None)]

    @pytest.mark.parametrize(("num_cards", "cached"), [(2, True), (3, False)])
    def test_a_negative_prompt_guides_attention(self, tmp_path, num_cards, cached):
        path = save_framepack(tmp_path / "framepack.safetensors")
        alone = framepack_steps(path, RunSettings(), cached, nag=True)
        assert not alone[0].equal(framepack_steps(path, RunSettings(), cached)[0])
        made = framepack_steps(path, on_cards(num_cards), cached, nag=True)
        assert all(one.equal(other) for one, other in zip(made, alone, strict=True))


@torch.inference_mode()
def framepack_steps(
    path: Path, settings: RunSettings, cached: bool, nag: bool = False, prepare: Any = None
) -> list[Tensor]:
    """Four steps, of which a cache that changes hardly reach skips two."""
    generator = torch.Generator().manual_seed(7)

    def frames(*indices: int) -> Frames:
        return Frames(torch.randn(1, 16, len(indices), 8, 12, generator=generator), torch.tensor(indices))

    model, cache = StreamedFramePack(path, settings), TeaCache(4, threshold=1e9) if cached else None
    plan = model.make_plan(SectionSize(9, 64, 96, nag=nag), limits_for(CPU))
    prompt = Prompt(torch.randn(1, 7, 24, generator=generator), torch.randn(1, 12, generator=generator))
    other = Prompt(-prompt.text[:, 2:], prompt.pooled)
    times = torch.tensor([900.0, 880.0, 860.0, 500.0])
    (steps, negative), _ = model.prepared(plan, [prompt, other], [], times, 6000.0)
    model.start_fitting(plan)
    if prepare is not None:
        prepare(model)
    history, noisy = History(frames(0, 10), frames(11, 12), frames(13, 14, 15, 16)), frames(1, 2, 3)
    made = []
    for index, step in enumerate(steps):
        if cache is not None:
            cache.begin_step(index)
        shown = replace(step, nag=StepNag(negative[index], NagSettings())) if nag else step
        made.append(model(noisy, history, shown, None, cache))
    model.release()
    return made


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_on_every_card(file: Path) -> None:
    """Blocks compiled before and after the cards join: attention's exchange stays outside their graphs."""
    made = []
    for settings in (RunSettings(), on_cards(2)):
        model = StreamedWan(file, settings)
        model.compile(CompileSettings(backend="eager"))
        if settings.others:
            model.use_cards((CPU,))  # anew, as a node does that comes later
        model.start_fitting(model.make_plan(WORK, limits_for(CPU)))
        assert all(block._compiled_call_impl is not None for block in model.blocks)
        made.append(model(*inputs()))
        if model.several is not None:
            assert all(block._compiled_call_impl is not None for block in model.several.others[0].blocks)
        model.release()
    assert made[0].equal(made[1])


class TestFailures:
    def test_out_of_memory_on_another_card_is_repeated_leaner(self, file, monkeypatch):
        with torch.inference_mode():
            expected = started(file, RunSettings())(*inputs())
            model = started(file, on_cards(2))
            assert model.several is not None and model.plan is not None
            other, before = model.several.others[0], model.plan
            attend, left = other.model.execution.attention.attend, [1]

            def full(*qkv: Tensor) -> Tensor:
                if left and left.pop():
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
                return attend(*qkv)

            monkeypatch.setattr(other.model.execution.attention, "attend", full)
            assert model(*inputs()).equal(expected)
            assert model.plan.denoise.total < before.denoise.total
        model.release()

    def test_an_interrupt_between_blocks_ends_all_cleanly(self, file):
        class Interrupt(BaseException):
            pass

        with torch.inference_mode():
            expected = started(file, RunSettings())(*inputs())
            for at in (1, 3):
                left = [at]

                def hook(left: list[int] = left) -> None:
                    left[0] -= 1
                    if left[0] == 0:
                        raise Interrupt

                model = StreamedWan(file, on_cards(3), between_blocks=hook)
                plan = model.make_plan(WORK, limits_for(CPU))
                left[0] = 1000
                model.start_fitting(plan)
                left[0] = at
                with pytest.raises(Interrupt):
                    model(*inputs())
                assert model(*inputs()).equal(expected)
                model.release()


class TestSparse:
    """Each card leaves out of its heads what one card would; the first one learns for all."""

    @pytest.fixture(autouse=True)
    def kernel(self, monkeypatch):
        monkeypatch.setattr(attending, "select_sparse", Sol)

    @pytest.mark.parametrize("bound", [None, 0.2])
    def test_equal_to_one_card(self, file, bound):
        sparse = replace(ALWAYS, bound=bound, dense_layers=1, dense_percent=25)
        alone, dense = (sparse_steps(file, RunSettings(sparse=each), 1) for each in (sparse, None))
        same = [one.equal(other) for one, other in zip(alone.velocities, dense.velocities, strict=True)]
        assert same == [True, False, False]
        for num_cards, batch in ((2, 1), (3, 1), (2, 2), (4, 2)):
            made = sparse_steps(file, on_cards(num_cards, sparse=sparse), batch)
            assert all(one.equal(other) for one, other in zip(made.velocities, alone.velocities, strict=True))
            if bound is not None:
                assert made.learnt is not None and alone.learnt is not None
                torch.testing.assert_close(made.learnt, alone.learnt)
                assert not alone.learnt[1:, 0].eq(0.5).all(), "nothing was learnt"

    def test_framepack(self, tmp_path):
        path = save_framepack(tmp_path / "framepack.safetensors")
        alone, made = (
            framepack_steps(path, how(sparse=ALWAYS), False, nag=True) for how in (RunSettings, partial(on_cards, 2))
        )
        assert not alone[0].equal(framepack_steps(path, RunSettings(), False, nag=True)[0])
        assert all(one.equal(other) for one, other in zip(made, alone, strict=True))

    def test_cards_come_and_go(self, file):
        """The settings stay; so they do on the safe path and back."""

        def last(model: StreamedWan) -> Tensor:
            return sparse_steps(model, None, 2, 1).velocities[0]

        model = StreamedWan(file, RunSettings(sparse=ALWAYS))
        want = last(model)
        for cards in ((CPU, CPU), ()):
            model.use_cards(cards)
            made = last(model)
            assert made.equal(want)
        model.use_cards((CPU, CPU))
        assert model.take_safe_path()
        dense = last(model)
        model.leave_safe_path()
        assert last(model).equal(want) and not dense.equal(want)
        model.use_sparse(None)
        assert last(model).equal(dense)
        model.release()

    def test_what_was_watched_before_the_cards_came_is_not_watched_on_them(self):
        """They have no such run, and would not answer."""
        inexact = Sdpa(CPU)
        inexact.exact = False
        run = AttentionRun(inexact, 3, 3)
        part = Team((CPU, CPU)).share(0, (0, 1)).part(100)
        assert run.begin_pass(100, CPU) is not None
        assert run.begin_pass(100, CPU, CardsTogether.of(part, 3)) is None


@dataclass(frozen=True)
class SparseRun:
    velocities: list[Tensor]
    learnt: Tensor | None


@torch.inference_mode()
def sparse_steps(path: Path | StreamedWan, settings: RunSettings | None, batch: int, num_steps: int = 3) -> SparseRun:
    """Both velocities of each step, of 240 tokens; in turn, or `batch` at once."""
    model = path if isinstance(path, StreamedWan) else StreamedWan(path, settings)
    model.start_fitting(model.make_plan(replace(WORK, batch=batch, passes_per_step=2 // batch), limits_for(CPU)))
    generator = torch.Generator().manual_seed(4)
    latent, text = torch.randn(2, 16, 5, 12, 16, generator=generator), torch.randn(2, 6, 32, generator=generator)
    made = []
    for step in range(num_steps):
        model.at_step(step, num_steps)
        time, moved = torch.full((2,), 1000.0 - 100 * step), latent * (1 - 0.1 * step)
        parts = [slice(first, first + batch) for first in range(0, 2, batch)]
        made.append(torch.cat([model(moved[part], time[part], text[part]) for part in parts]))
    watch = model.model.execution.watch
    learnt = None
    if watch is not None:
        watch.collect()
        state = watch.state()
        learnt = None if state is None else state[0]  # nothing waits to be learnt
    if model is not path:
        model.release()
    return SparseRun(made, learnt)


class TestPipeline:
    @pytest.mark.parametrize(("num_cards", "guidance"), [(2, 4.0), (3, 1.0)])
    def test_a_video_of_two_experts_is_the_same(self, files, num_cards, guidance):
        request = replace(REQUEST, guidance=guidance)
        expected = latent_of(files, request)
        assert latent_of(files, request, on_cards(num_cards)).equal(expected)

    def test_cards_may_be_left_again(self, file):
        with torch.inference_mode():
            expected = started(file, RunSettings())(*inputs())
            model = started(file, on_cards(3))
            for cards in ((), (CPU,)):
                model.use_cards(cards)
                model.start_fitting(model.make_plan(WORK, limits_for(CPU)))
                assert model(*inputs()).equal(expected)
        model.release()

    def test_report_and_plan_tell_of_every_card(self, files):
        pipeline = WanPipeline(files, on_cards(2))
        list(pipeline.generate(replace(REQUEST, num_steps=1)))
        assert "cpu beside it: VRAM peak" in pipeline.report().table()
        assert pipeline.plan is not None
        assert "on 2 cards" in describe(pipeline.plan) and "of each card" in describe(pipeline.plan)


class TestInputs:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_all_are_brought_before_any_card_computes(self, file, batch):
        """A copy from the first card comes behind all that it was given before: another one would begin that late."""
        model, done = StreamedWan(file, on_cards(2)), []
        assert model.several is not None
        model.start_fitting(model.make_plan(replace(WORK, batch=batch), limits_for(CPU)))

        def bring(card: StreamedWan, samples: slice) -> slice:
            done.append("brought")
            return samples

        def make(card: StreamedWan, samples: slice) -> torch.Tensor:
            done.append("made")
            return torch.zeros(samples.stop - samples.start)

        model.several.run(batch, bring, make)
        assert done == 2 * ["brought"] + 2 * ["made"]
        model.release()

    @pytest.mark.parametrize("batch", [1, 2])
    def test_no_card_looks_at_another_s_memory_for_a_prompt_that_it_knows(self, file, batch):
        """It would wait for that card. Hosts make a new tensor of a prompt for every step."""
        model = StreamedWan(file, on_cards(2))
        model.start_fitting(model.make_plan(replace(WORK, batch=batch), limits_for(CPU)))
        latent, time, text = (torch.cat(batch * [each]) for each in inputs())
        with torch.inference_mode():
            model(latent, time, text)
            known = [each._contexts[0][0] for each in (model, *model._others)]
            for again in (text, text.clone()):
                model(latent, time, again)
                parts = model._parts_known(again, None)
                places = [(part.start, part.stop) for part, _ in shared_samples(batch, 2)]
                assert all(parts[place][0] is one for place, one in zip(places, known, strict=True))
            assert [len(each._contexts) for each in (model, *model._others)] == [1, 1]
        model.release()

    def test_of_prompts_that_take_turns_none_is_compared_to_find_the_same_tensor(self, file):
        """To compare them each pass, and each other card, would wait for the card that they are on."""
        model = StreamedWan(file, on_cards(2))
        model.start_fitting(model.make_plan(replace(WORK, passes_per_step=2), limits_for(CPU)))
        latent, time, text = inputs()
        texts, cards = (text, -text), (model, *model._others)
        with torch.inference_mode():
            for each in texts:
                model(latent, time, each)
            known = [[context for _, _, context in card._contexts] for card in cards]
            with Compared() as compared:
                parts = [model._parts_known(each, None)[0, 1] for each in texts]
                assert [[card.context(*part) for part in parts] for card in cards] == known
                assert compared.count == 0
                assert model._parts_known(text.clone(), None)[0, 1] is parts[0] and compared.count == 1
        model.release()


class Compared(TorchFunctionMode):
    """How often this thread asked whether tensors are equal."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.equal
        return func(*args, **(kwargs or {}))


class TestLinks:
    def test_a_link_that_is_too_slow_is_refused_with_its_figure(self, file):
        """Unless nothing is exchanged: samples on cards of their own."""
        model, slow = StreamedWan(file, on_cards(2)), replace(limits_for(CPU), link_gbps=0.05)
        with pytest.raises(PlanError, match=r"between them carries 0\.05 GB/s: it would take longer than on one card"):
            model.make_plan(WORK, slow)
        assert model.make_plan(replace(WORK, batch=2), slow).work.cards == 2
        plan = model.make_plan(WORK, replace(slow, link_gbps=300.0))
        exchanged = in_gb(plan.model.exchanged_bytes(plan.work))
        assert f"{exchanged} per pass from the others, at 300.0 GB/s." in describe(plan)

    def test_groups_of_heads_hide_what_is_exchanged_where_that_takes_long(self):
        """Each is asked for by all cards' hosts: a fast link, or a short clip, has fewer."""
        clip = replace(LONG_480P, frames=17)

        def sizes(work: WorkSize, gbps: float | None, cards: int = 2) -> tuple[int, ...] | None:
            rates = {"tflops_matmul": 790.0, "tflops_attention": 570.0}
            return hidden_sizes(plan_shared(FP8, work, gpu_limits(80, link_gbps=gbps, **rates), cards), cards)

        assert sizes(clip, 320.0) == (20,)
        fast, slow, three = sizes(LONG_480P, 320.0), sizes(LONG_480P, 20.0), sizes(LONG_480P, 20.0, cards=3)
        assert fast is not None and len(fast) == 2 and fast[0] < fast[1]
        assert slow is not None and len(slow) > 2 and max(slow[0], slow[-1]) < max(slow)
        assert three is not None and sum(three) == 14  # of 40, a card with the most has so many
        assert sizes(clip, None) is None

    def test_what_no_card_exchanges_is_not_counted(self):
        """Each of two cards has one of guidance's prompts: it takes what one card does for one, and says so.

        But for a pass of one prompt alone, which an expert without guidance has: they share that.
        """
        both = plan_shared(FP8, replace(LONG_480P, batch=2), gpu_limits(80, link_gbps=20.0), 2)
        assert both.model.exchanged_bytes(both.work) == 0
        own, shared, split = (
            both.model.activation_bytes(work, both.choice, both.limits)
            for work in (LONG_480P, replace(LONG_480P, cards=2), both.work)
        )
        assert both.denoise.activations == split == max(own, shared)
        said = "streams every block that it does not hold, and gets nothing from the others: its samples are its own."
        assert f"of 2, each computes 32760 of 65520 tokens, {said}" in describe(both)
        four = plan_shared(FP8, replace(LONG_480P, batch=2), gpu_limits(80, link_gbps=20.0), 4)
        pair = plan_shared(FP8, LONG_480P, gpu_limits(80, link_gbps=20.0), 2)
        assert four.model.exchanged_bytes(four.work) == pair.model.exchanged_bytes(pair.work)
        assert seen_of(four) == seen_of(pair)

    @pytest.mark.parametrize("gbps", [8.0, 20.0, 320.0])
    def test_a_pass_of_one_prompt_hides_its_exchange_by_a_plan_of_both_too(self, gbps):
        """As an expert without guidance has it: each card of the plan's own passes has a prompt of its own."""
        both, one = (
            plan_shared(FP8, replace(LONG_480P, batch=batch), gpu_limits(80, link_gbps=gbps), 2) for batch in (2, 1)
        )
        assert hidden_sizes(both, 2) == hidden_sizes(one, 2)

    def test_groups_of_cards_ask_for_their_blocks_beside_each_other(self, file):
        """Four cards, two prompts: the first two do not ask for all of their pass before the others begin."""
        model, asked = StreamedWan(file, on_cards(4)), list[int]()
        model.start_fitting(model.make_plan(replace(WORK, batch=2), limits_for(CPU)))
        for rank, each in enumerate([model, *model.several.others]):
            for block in each.model.blocks:
                block.register_forward_pre_hook(lambda *_, rank=rank: asked.append(rank))
        with torch.inference_mode():
            model(*inputs(2))
        firsts = [asked.index(rank) for rank in range(4)]
        assert max(firsts) < len(asked) // 2, asked
        model.release()

    def test_cards_that_exchange_nothing_look_for_no_groups(self, file):
        """There are 92,171 ways to have 40 heads in groups, and none of them counts."""
        model = StreamedWan(file, on_cards(2))
        limits = replace(limits_for(CPU), link_gbps=300.0)
        model.start_fitting(model.make_plan(replace(WORK, batch=2), limits))
        before = hiding_sizes.cache_info()
        with torch.inference_mode():
            model(*inputs(2))
        assert hiding_sizes.cache_info() == before
        model.release()

    def test_no_group_is_larger_than_the_plan_has_room_for(self):
        plan = plan_shared(FP8, LONG_480P, gpu_limits(80, link_gbps=320.0), 2)
        for head_groups in (1, 2, 3, 7, 20):
            tight = replace(plan, choice=replace(plan.choice, head_groups=head_groups))
            sizes = hidden_sizes(tight, 2)
            assert sizes is not None and sum(sizes) == 20 and max(sizes) <= -(-20 // head_groups)

    def test_cards_that_compute_in_8_bits_exchange_so_where_the_way_is_slow(self):
        """Half of the bytes; never where the user did not choose 8 bits, or where nothing is exchanged."""

        def plan(gbps: float | None, in_8_bits: bool = True, work: WorkSize = LONG_480P) -> MemoryPlan:
            return plan_shared(replace(FP8, in_8_bits=in_8_bits), work, gpu_limits(80, link_gbps=gbps), 2)

        slow, exact = plan(20.0), plan(20.0, in_8_bits=False)
        assert [each.model.packs_exchange for each in (slow, exact, plan(390.0), plan(None))] == [True] + 3 * [False]
        assert not plan(20.0, work=replace(LONG_480P, batch=2)).model.packs_exchange
        said = "What the cards exchange travels in 8 bits"
        assert said in describe(slow) and said not in describe(exact)
        packed, whole = (each.model.exchanged_bytes(each.work) for each in (slow, exact))
        assert packed == pytest.approx(whole * (128 + 4) / 256, rel=1e-6)
        assert seen_of(slow) < 0.6 * seen_of(exact)
        with pytest.raises(PlanError, match=f"exchange {in_gb(packed, decimals=1)} each"):
            plan(0.02)  # too slow in 8 bits too

    def test_a_pass_in_8_bits_is_nearly_that_of_one_card(self, file):
        with torch.inference_mode():
            expected = started(file, RunSettings())(*inputs())
            model = StreamedWan(file, on_cards(3))
            plan = model.make_plan(WORK, limits_for(CPU))
            model.start_fitting(replace(plan, model=replace(plan.model, packs_exchange=True)))
            error = float((model(*inputs()) - expected).norm() / expected.norm())
            assert 0 < error < 0.02
            model.start_fitting(plan)
            assert model(*inputs()).equal(expected)
        model.release()

    def test_what_has_no_links_to_measure_has_none(self):
        assert slowest_link((CPU, CPU)) is None
        assert slowest_link((torch.device("cuda:0"),)) is None


class TestCommandLine:
    def test_a_video_on_two_devices(self, files, tmp_path, capsys):
        command = [
            "generate", "--model", str(files.model), "--text-encoder", str(files.text_encoder), "--vae", str(files.vae),
            "--prompt", "a red ball", "--width", "48", "--height", "32", "--frames", "5", "--steps", "1", "--no-resume",
        ]  # fmt: skip
        assert main([*command, "--devices", "cpu,cpu", "-o", str(tmp_path / "two.mp4")]) == 0
        assert main([*command, "--device", "cpu", "-o", str(tmp_path / "one.mp4")]) == 0
        assert (tmp_path / "two.mp4").stat().st_size > 0

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("cpu,", "name devices with commas between them"),
            ("auto", "no GPU was found"),
            ("gpu,cpu", "device 'gpu' does not exist"),
            ("", "name devices with commas between them"),
        ],
    )
    def test_lists_that_are_none_are_refused(self, text, said):
        with pytest.raises(ValueError, match=said):
            parse_devices(text)

    def test_gpus_are_named_once(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert parse_devices("auto") == parse_devices("cuda:0, cuda:1") == parse_devices("cuda,cuda:1")
        with pytest.raises(ValueError, match="cuda:0 is there twice"):
            parse_devices("cuda,cuda:0")
        with pytest.raises(ValueError, match="name one kind"):
            parse_devices("cuda:0,cpu")
        with pytest.raises(ValueError, match=r"'cuda:2' does not exist: this machine has 2 GPU"):
            parse_devices("cuda:0,cuda:2")


class TestSharedBlocks:
    @pytest.mark.parametrize("num_slots", [1, 2])
    def test_two_streamers_at_once_have_the_owner_s_bytes(self, file, num_slots):
        """Each through a ring of its own, as cards have them."""
        models = [StreamedWan(file, RunSettings()) for _ in range(2)]
        weights = models[0].weights
        blocks = HostBlocks(weights.source, weights.layouts)
        sizes = [layout.nbytes for layout in weights.layouts]
        streamers = [
            BlockStreamer(model.blocks, source, CPU, ring=DeviceRing(ring_bytes(sizes, num_slots), CPU), part=Part.ALL)
            for model, source in zip(models, (blocks, SharedBlocks(blocks)), strict=True)
        ]
        for streamer in streamers:
            streamer.load()
        for _ in range(2):
            passes = [streamer(model.blocks) for streamer, model in zip(streamers, models, strict=True)]
            for index, (one, other) in enumerate(zip(*passes, strict=True)):
                stored = models[0].checkpoint.read(f"blocks.{index}.ffn.0.weight")
                assert one.ffn[0].weight.equal(stored) and other.ffn[0].weight.equal(stored)
                assert one.ffn[0].weight.data_ptr() != other.ffn[0].weight.data_ptr()
        for streamer in streamers:
            streamer.unload()
        blocks.release()
