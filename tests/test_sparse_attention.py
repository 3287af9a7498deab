"""Sparse attention in a run: the order of tokens, when it is sparse, and the error bound that the run keeps."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.attention.backend import AttentionSpec, AttentionWorkspace, BlockChoice
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.attention.sparse import run as run_module
from lowvram_video.attention.sparse.bound import Bound
from lowvram_video.attention.sparse.order import TokenOrder, compact_order, reorder_, shown_order, video_order
from lowvram_video.attention.sparse.readings import LayerReading, Sums
from lowvram_video.attention.sparse.run import AttentionPass, AttentionRun
from lowvram_video.attention.sparse.samples import Samples, compare
from lowvram_video.attention.sparse.settings import PRESETS, SparseSettings
from lowvram_video.cli.sparse import add_sparse, sparse_of
from lowvram_video.cli.step_cache import add_step_cache, step_cache_of
from lowvram_video.framepack.network.model import FramePackModel, Frames, History, StepCondition, StepNag
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.memory.report.attention import table
from lowvram_video.runtime import attending
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.wanvideo.network.model import Extras, Visitor, WanModel
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.streamed import StreamedWan
from torch import Tensor

from . import tiny, tiny_framepack
from .sol_reference import chosen, sol_attention
from .test_attention import plain_attention, relative_error
from .test_inexact_attention import planted
from .test_pipeline import REQUEST

CPU = torch.device("cpu")


class Sol:
    """A `SparseBackend` by the definition, that counts its calls."""

    name = "sol_attn"
    workspace = AttentionWorkspace(per_query=1.0)

    def __init__(self, spec: AttentionSpec | None = None) -> None:
        self.calls: list[BlockChoice] = []

    def refuse(self, spec: AttentionSpec) -> str | None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockChoice) -> Tensor:
        self.calls.append(blocks)
        return self.reference(q, k, v, blocks)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockChoice) -> Tensor:
        return sol_attention(
            q, k, v, tau=blocks.tau, topk_ratio=blocks.top_k, sink_blocks=blocks.sinks, sink_q=blocks.exact_queries
        )


class Everything(Sol):
    """Leaves nothing out, by the dense attention of tests on a CPU."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockChoice) -> Tensor:
        self.calls.append(blocks)
        return Sdpa(CPU).attend(q, k, v)


ALWAYS = SparseSettings(tau=0.5, bound=None, dense_percent=0, dense_layers=0, min_tokens=0)


def sparse_run(settings: SparseSettings, layers: int = 3, heads: int = 1, kernel: Sol | None = None) -> AttentionRun:
    return AttentionRun(Sdpa(CPU), layers, heads, kernel or Sol(), settings)


# --- the order


@pytest.mark.parametrize(
    "grid", [(21, 30, 52), (21, 45, 80), (1, 30, 52), (9, 40, 38), (2, 3, 5), (5, 1, 1), (1, 1, 70)]
)
@pytest.mark.parametrize("apart", [False, True])
def test_every_token_has_one_place(grid: tuple[int, int, int], apart: bool) -> None:
    index = compact_order(grid, apart)
    assert index.sort().values.equal(torch.arange(math.prod(grid)))
    if apart:
        frame = grid[1] * grid[2]
        assert (index // frame).equal(torch.arange(len(index)) // frame)


def spread(grid: tuple[int, int, int], index: Tensor) -> float:
    """The mean distance of a token from the middle of its block of 64."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).float()[index]
    blocks = places[: len(places) // 64 * 64].unflatten(0, (-1, 64))
    return float((blocks - blocks.mean(1, keepdim=True)).norm(dim=-1).mean())


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (9, 40, 38), (9, 60, 34)])
def test_blocks_are_about_cubes(grid: tuple[int, int, int]) -> None:
    cube = spread((4, 4, 4), torch.arange(64))
    ours, raster = spread(grid, compact_order(grid)), spread(grid, torch.arange(math.prod(grid)))
    print(f"{grid}: a cube of 64 {cube:.2f}, ours {ours:.2f}, raster {raster:.2f}")
    assert ours < 1.25 * cube
    assert raster > 4 * cube


@pytest.mark.parametrize("spare", [None, torch.empty(10), torch.empty(4000, dtype=torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_are_the_same_bits(spare: Tensor | None, dtype: torch.dtype) -> None:
    order = video_order((5, 6, 4), num_sink_frames=1)
    x = torch.randn(2 * 120, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = x.clone()
    reorder_(there, order.index, spare)
    assert there[:24].equal(x[:24]) and there[120:144].equal(x[120:144])  # the reference's tokens stay
    assert there[120:].equal(x[120:][order.index]) and not there.equal(x)
    reorder_(there, order.inverse, spare)
    assert there.equal(x)


def test_sinks_are_gathered_at_one_end() -> None:
    wan = video_order((5, 20, 10), num_sink_frames=1)
    assert wan.sinks == (0, 4) and wan.exact_queries == (0, 0)  # 200 tokens are in the first four blocks
    shown = shown_order([30, 50], (4, 10, 10), num_text=70)
    assert shown.index[:400].sort().values.equal(torch.arange(80, 480))
    assert shown.index[400:480].equal(torch.arange(80)) and shown.index[480:].equal(torch.arange(480, 550))
    assert shown.sinks == (6, 9) and shown.exact_queries == (7, 9)
    assert video_order((2, 4, 4)).sinks == (0, 0)


# --- networks


def wan(settings: SparseSettings | None, variant: str = "t2v", kernel: Sol | None = None) -> WanModel:
    model = tiny.randomize(WanModel(tiny.CONFIGS[variant]))
    assert isinstance(model, WanModel)
    if settings is not None:
        model.execution = replace(
            model.execution, watch=AttentionRun(model.execution.attention, 3, 1, kernel or Sol(), settings)
        )
    return model.eval()


def wan_inputs(variant: str = "t2v", batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    channels = tiny.CONFIGS[variant].in_channels
    latent = torch.randn(batch, channels, 5, 12, 16, generator=generator)  # 240 tokens
    return latent, torch.full((batch,), 700.0), torch.randn(batch, 12, tiny.TEXT_DIM, generator=generator)


@pytest.mark.parametrize("variant, batch", [("t2v", 1), ("t2v", 2), ("i2v", 1)])
@torch.inference_mode()
def test_an_ordered_pass_of_dense_layers_has_the_bits_of_an_unordered_one(
    variant: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only attention knows of the order: the first layer orders the tokens, and all are attended as if it had not."""
    inputs = wan_inputs(variant, batch)
    expected = wan(None, variant)(*inputs)
    orders: list[AttentionPass] = []

    def dense(self: AttentionPass, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.ordered and self.order is not None
        orders.append(self)
        places = self.order.inverse
        return Sdpa(CPU).attend(q, k.index_select(1, places), v.index_select(1, places))

    model = wan(ALWAYS, variant)
    monkeypatch.setattr(AttentionPass, "attend_now", dense)
    assert model(*inputs).equal(expected)
    assert len(orders) == 3


@torch.inference_mode()
def test_layers_that_run_dense_in_an_ordered_pass_see_keys_in_their_places() -> None:
    inputs, kernel = wan_inputs(), Everything()
    model = wan(replace(ALWAYS, bound=0.5), kernel=kernel)
    watch = model.execution.watch
    assert watch is not None and watch._learning.bound is not None
    for layer in (1, 2):
        watch._learning.bound.layers[layer].dense = True
    error = relative_error(model(*inputs), wan(None)(*inputs))
    assert len(kernel.calls) == 1
    assert error < 1e-5


@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
@torch.inference_mode()
def test_a_sparse_pass_that_leaves_nothing_out_is_the_dense_one(variant: str) -> None:
    """ti2v's timesteps differ from frame to frame: each frame's tokens stay together, so that they get their own."""
    latent, timestep, text = wan_inputs(variant)
    if variant == "ti2v":
        timestep = torch.tensor([[0.0, 700.0, 500.0, 300.0, 100.0]])
    kernel = Everything()
    error = relative_error(
        wan(ALWAYS, variant, kernel)(latent, timestep, text), wan(None, variant)(latent, timestep, text)
    )
    print(f"{variant}: {error:.1e}")
    assert len(kernel.calls) == 3 and error < 1e-5


@torch.inference_mode()
def test_tokens_of_a_reference_picture_are_sinks() -> None:
    config = replace(tiny.CONFIGS["t2v"], reference_channels=16)
    made = []
    for settings in (None, ALWAYS):
        model = tiny.randomize(WanModel(config))
        assert isinstance(model, WanModel)
        kernel = Everything()
        if settings is not None:
            model.execution = replace(
                model.execution, watch=AttentionRun(model.execution.attention, 3, 1, kernel, settings)
            )
        extras = Extras(reference=torch.ones(1, 16, 12, 16))
        made.append(model(*wan_inputs(), extras=extras))
    assert relative_error(made[1], made[0]) < 1e-5
    assert {blocks.sinks for blocks in kernel.calls} == {(0, 1)}  # 48 tokens


@torch.inference_mode()
def test_control_videos_are_ordered_alike() -> None:
    config = replace(tiny.CONFIGS["t2v"], vace_layers=2, vace_channels=8)
    made, kernel = [], Everything()
    for watched in (False, True):
        model = tiny.randomize(WanModel(config))
        assert isinstance(model, WanModel)
        if watched:
            watch = AttentionRun(model.execution.attention, 5, 1, kernel, replace(ALWAYS, dense_layers=2))
            model.execution = replace(model.execution, watch=watch)
        frames = torch.randn(1, 8, 5, 12, 16, generator=torch.Generator().manual_seed(2))
        made.append(model(*wan_inputs(), extras=Extras(vace_frames=(frames,), vace_strengths=(0.8,))))
    assert relative_error(made[1], made[0]) < 1e-5
    assert len(kernel.calls) == 3


@torch.inference_mode()
def test_who_is_shown_tokens_sees_them_in_their_places() -> None:
    class Seeing(Visitor):
        sees_stream = True

    kernel, inputs = Everything(), wan_inputs()
    model = wan(ALWAYS, kernel=kernel)
    out = model(*inputs, extras=Extras(visitor=Seeing()))
    assert len(kernel.calls) == 3
    assert out.equal(wan(None)(*inputs))


def framepack(settings: SparseSettings | None, kernel: Sol) -> FramePackModel:
    config = tiny_framepack.CONFIG
    model = FramePackModel(config)
    model.load_state_dict(tiny_framepack.make_tensors(config))
    if settings is not None:
        layers = config.num_layers + config.num_single_layers
        watch = AttentionRun(model.execution.attention, layers, config.num_heads, kernel, settings)
        model.execution = replace(model.execution, watch=watch)
    return model.eval()


@pytest.mark.parametrize("guided", [False, True])
@torch.inference_mode()
def test_framepack_orders_the_noise_and_attends_history_and_text_always(guided: bool) -> None:
    """With a negative prompt of attention too, whose rows stand behind the text and are attended without it."""
    config, kernel = tiny_framepack.CONFIG, Everything()
    generator = torch.Generator().manual_seed(0)

    def frames(count: int, first: int) -> Frames:
        latents = torch.randn(1, config.in_channels, count, 8, 12, generator=generator)
        return Frames(latents, torch.arange(first, first + count))

    noisy, history = frames(5, 1), History(frames(2, 0), frames(2, 6), frames(4, 8))
    layers = config.num_layers + config.num_single_layers
    vectors = [12] * config.num_layers + [3] * config.num_single_layers

    def condition(num_text: int) -> StepCondition:
        blocks = tuple(0.3 * torch.randn(count, config.dim, generator=generator) for count in vectors)
        return StepCondition(torch.randn(num_text, config.dim, generator=generator), blocks, torch.zeros(2, config.dim))

    shown = condition(9)
    if guided:
        shown = replace(shown, nag=StepNag(condition(70), NagSettings(3.0)))
    made = []
    for settings in (None, replace(ALWAYS, dense_layers=1, bound=0.5)):
        model = framepack(settings, kernel)
        watch = model.execution.watch
        if watch is not None and watch._learning.bound is not None:
            watch._learning.bound.layers[-1].dense = True
        made.append(model(noisy, history, shown))
    error = relative_error(made[1], made[0])
    print(f"framepack: {error:.1e}, {kernel.calls[0]}")
    assert error < 1e-5
    own, others = 5 * 4 * 6, 2 * 24 + 1 * 2 * 3 + 1 * 1 * 2
    lengths = [own + others + 9] + ([own + others + 70] if guided else [])
    assert {blocks.sinks for blocks in kernel.calls} == {(own // 64, -(-tokens // 64)) for tokens in lengths}
    assert len(kernel.calls) == len(lengths) * (layers - 2)


# --- when it is sparse


@pytest.mark.parametrize(
    "step, num_steps, tokens, sparse",
    [
        (0, 20, 100, False),
        (4, 20, 100, False),
        (5, 20, 100, True),
        (19, 20, 100, True),
        (5, 20, 63, False),
        (0, 0, 100, True),
    ],
)
def test_the_first_steps_and_short_passes_are_dense(step: int, num_steps: int, tokens: int, sparse: bool) -> None:
    run = sparse_run(SparseSettings(min_tokens=64, bound=0.1))
    if num_steps:
        run.begin_step(step, num_steps)
    begun = run.begin_pass(tokens, CPU)
    assert begun is not None and begun.sparse == sparse


def test_attention_that_is_chosen_in_the_first_pass_knows_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI tells of the step before the size of the work is known, and the fastest attention is chosen by that."""

    class Quick(Sdpa):
        name = "quick"

    monkeypatch.setattr(attending, "select_fastest", lambda *_: Quick(CPU))
    monkeypatch.setattr(StreamedWan, "_may_time", property(lambda self: True))
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    with with_kernel(Sol):
        model = StreamedWan(path, RunSettings(sparse=RUN))
        model.begin_steps()
        for step, sparse in ((0, False), (1, True)):
            model.at_step(step, 4)
            model.choose_attention(1000)
            watch = model.model.execution.watch
            assert watch is not None and watch.dense.name == "quick"
            begun = watch.begin_pass(1000, CPU)
            assert begun is not None and begun.sparse == sparse


def test_the_first_layers_are_dense() -> None:
    run = sparse_run(replace(ALWAYS, dense_layers=2))
    assert [run.chosen(layer) is not None for layer in range(3)] == [False, False, True]


def test_exact_attention_alone_is_not_watched() -> None:
    assert AttentionRun(Sdpa(CPU), 3, 1).begin_pass(100, CPU) is None


# --- the bound


def test_a_bound_of_0_leaves_every_layer_dense() -> None:
    run = sparse_run(replace(ALWAYS, bound=0.0))
    begun = run.begin_pass(1000, CPU)
    assert begun is not None and not begun.sparse


def learn(bound: Bound, error: float, times: int = 1) -> None:
    for _ in range(times):
        if bound.chosen(0) is None:
            bound.learn(0, [], told_exact=True)
        else:
            bound.learn(0, [Sums(error**2, 1.0)])


def test_what_is_kept_follows_the_error() -> None:
    bound = Bound(SparseSettings(tau=1.0, bound=0.1), 1)
    first = bound.chosen(0)
    assert first == (-1.0, 0.0)  # much less than was asked for, until something is measured
    learn(bound, 0.01, 6)
    assert bound.chosen(0) == (1.0, 0.0)  # never sparser than that
    learn(bound, 0.3)
    assert bound.chosen(0) is None  # exact in the next call
    learn(bound, 0.3)
    denser = bound.chosen(0)
    assert denser is not None and denser[0] < 0.3
    learn(bound, 0.01, 10)
    assert bound.chosen(0) == denser  # and no less again
    learn(bound, 0.3, 10)
    assert bound.chosen(0) is None  # even at its densest it is beyond the bound
    learn(bound, 0.001, 10)
    assert bound.chosen(0) is None


def test_a_layer_is_over_its_bound_few_times() -> None:
    """However its error changes, it does not go back and forth for ever."""
    bound = Bound(PRESETS["fast"], 1)
    excesses = 0
    for call in range(200):
        exact = bound.chosen(0) is None
        learn(bound, 0.21 if call % 3 == 0 else 0.001)
        excesses += not exact and bound.chosen(0) is None
    assert bound.layers[0].dense and 1 <= excesses <= 6


def test_the_worst_pass_of_a_call_counts() -> None:
    """Of the prompt's and the negative prompt's; whichever is first."""
    good, bad = Sums(0.01**2, 1.0), Sums(0.3**2, 1.0)
    bounds = [Bound(SparseSettings(bound=0.1), 1) for _ in range(2)]
    for each, passes in zip(bounds, ([good, bad], [bad, good]), strict=True):
        learn(each, 0.01, 6)
        each.learn(0, passes)
        assert each.chosen(0) is None
        each.learn(0, [], told_exact=True)
    first, second = (each.chosen(0) for each in bounds)
    assert first == second and first is not None and first[0] < 0.3


def test_a_share_by_hand_grows_where_the_error_is_too_large() -> None:
    bound = Bound(SparseSettings(top_k=0.15, bound=0.1), 1)
    learn(bound, 0.01, 6)
    assert bound.chosen(0) == (1.0, 0.15)
    learn(bound, 0.5, 2)
    found = bound.chosen(0)
    assert found is not None and 0.3 < found[1] <= 0.9
    assert Bound(SparseSettings(top_k=0.15, bound=None), 1).chosen(0) == (1.0, 0.15)


def test_what_is_no_number_makes_a_layer_dense() -> None:
    bound = Bound(SparseSettings(bound=0.1), 1)
    bound.learn(0, [Sums(math.nan, 1.0)])
    assert bound.chosen(0) is None


def test_what_was_learnt_is_taken_up() -> None:
    bound, again = (Bound(SparseSettings(bound=0.1), 2) for _ in range(2))
    for error in (0.01, 0.02, 0.2, 0.2, 0.05, 0.2, 0.05):
        learn(bound, error)
        again.restore(bound.state().tolist())
        assert again.layers == bound.layers and again.chosen(0) == bound.chosen(0)
    run = sparse_run(replace(ALWAYS, bound=0.1, tau=1.0), layers=2)
    run.restore(bound.state())  # alone, with nothing that waits to be learnt
    assert run.chosen(0) == bound.chosen(0)


def test_what_an_earlier_version_kept_is_taken_up() -> None:
    """`[1 + passes, layers, 4]`: slack, dense, difference, norm; of passes difference, norm, density, looked."""
    run = sparse_run(BOUNDED, layers=2)
    run.restore(torch.tensor([[[1.5, 0, 1e-6, 1], [0, 1, 0, 0]], [[1e-4, 1, 0.5, 1], [0, 0, 0, 0]]]).double())
    found = run.chosen(0)
    assert found is not None and found[0] == pytest.approx(1.0) and run.chosen(1) is None


def begun_pass(
    run: AttentionRun, tokens: int, step: int, num_steps: int = 20, call: int | None = None
) -> AttentionPass:
    run.begin_step(step, num_steps, call)
    begun = run.begin_pass(tokens, CPU)
    assert begun is not None
    begun.order = TokenOrder.of(torch.arange(tokens))
    return begun


def measure(run: AttentionRun, step: int, num_steps: int = 20, call: int | None = None) -> list[BlockChoice]:
    """A pass of all layers, far from the bound; what was chosen in it."""
    q, k, v = planted(320, heads=1)
    assert isinstance(run.sparse, Sol)
    before = len(run.sparse.calls)
    begun = begun_pass(run, 320, step, num_steps, call)
    for layer in range(run.num_layers):
        begun.begin_layer(layer, [], q)
        begun.attend(q, k, v)
    begun.end(q.flatten(0, 1).clone(), q)
    return run.sparse.calls[before:]


BOUNDED = replace(ALWAYS, tau=2.0, bound=0.15)


@pytest.mark.parametrize("num_steps", [1, 20])
def test_a_run_begins_with_nothing_of_the_one_before(num_steps: int) -> None:
    """Also where that was stopped in its first step, or had no other."""
    run, fresh = (sparse_run(BOUNDED, layers=1) for _ in range(2))
    measure(run, 0, num_steps)
    assert run.readings() and run.chosen(0) != fresh.chosen(0)
    run.begin_run()
    run.begin_step(0, num_steps)
    assert run.chosen(0) == fresh.chosen(0)


def test_a_run_that_goes_on_at_a_later_step_keeps_what_it_is_told() -> None:
    """In a new process, and in one that has just had another run; ComfyUI tells of no step before it."""
    first = sparse_run(BOUNDED, layers=1)
    for step in range(3):
        measure(first, step)
    learnt = first.state()
    assert learnt is not None
    first.collect()
    fresh, used = (sparse_run(BOUNDED, layers=1) for _ in range(2))
    for step in range(20):
        begun_pass(used, 320, step)
    for run in (fresh, used):
        run.begin_run()
        run.restore(learnt)
        run.begin_step(3, 20)
        assert run.chosen(0) == first.chosen(0) != sparse_run(BOUNDED, layers=1).chosen(0)


def test_what_was_measured_before_is_no_part_of_what_a_run_is_told() -> None:
    """A step cache has passes made once more, whose errors the record knows of."""
    first = sparse_run(BOUNDED, layers=1)
    measure(first, 0)
    learnt = first.state()
    assert learnt is not None
    first.collect()
    again = sparse_run(BOUNDED, layers=1)
    measure(again, 0)
    again.restore(learnt)
    begun_pass(again, 320, 1)
    assert again.chosen(0) == first.chosen(0)


def test_each_call_of_a_sampler_knows_what_the_one_before_measured() -> None:
    """Heun's method calls the model twice for a level, once as the middle of a step, once as the next one's start."""
    run = sparse_run(BOUNDED, layers=1)
    taus = [measure(run, step, call=call)[0].tau for call, step in enumerate((0, 1, 1, 2, 2))]
    assert len(set(taus[:3])) == 3, taus
    assert {each.step for each in run.readings()} == {0, 1, 2}


def test_passes_of_one_call_choose_alike() -> None:
    run = sparse_run(BOUNDED, layers=1)
    first, *others = (measure(run, step, call=call) for step, call in ((0, 0), (0, 0), (0, 0), (1, 1)))
    assert first == others[0] == others[1] != others[2]


def test_a_sampler_that_goes_back_forgets_nothing() -> None:
    """heunpp2 looks two levels ahead; noise that is added anew raises a level over the one before."""
    run, fresh = (sparse_run(BOUNDED, layers=1) for _ in range(2))
    made = [measure(run, step, call=call)[0].tau for call, step in enumerate((*range(8), 1))]
    start = fresh.chosen(0)
    assert start is not None and made[0] == start[0] and made[-1] == made[-2] != made[0], made
    assert {each.step for each in run.readings()} == set(range(8))


def test_a_run_of_more_calls_than_steps_goes_on_to_the_same_choice() -> None:
    """What is kept of a run is of its calls: one that was stopped in the middle of a step goes on from there."""
    steps = (0, 1, 1, 2, 2)
    whole = sparse_run(BOUNDED, layers=1)
    made = []
    for call, step in enumerate(steps):
        learnt = whole.state()
        again = sparse_run(BOUNDED, layers=1)
        assert learnt is not None
        again.restore(learnt)
        made.append((measure(whole, step, call=call), measure(again, step, call=0)))
    assert all(one == other for one, other in made)


def test_the_host_waits_for_nothing_that_the_device_still_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs ahead of the device: when it comes to a layer, at most that layer of the call before must be done."""
    layers, asked = 8, list[str]()

    class Mark:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            asked.append(self.name)

    begun: AttentionPass | None = None

    def mark(device: torch.device) -> Mark:
        assert begun is not None
        return Mark(f"{begun.decision.call}: {begun._num_sent}")

    monkeypatch.setattr("lowvram_video.attention.sparse.readings.mark_on", mark)
    run = sparse_run(BOUNDED, layers=layers)
    q, k, v = planted(320, heads=1)
    waits = list[list[list[str]]]()
    for step in range(3):
        run.begin_step(step, 20)
        begun = run.begin_pass(320, CPU)
        assert begun is not None
        assert not asked, "a pass begins without waiting"
        begun.order = TokenOrder.of(torch.arange(320))
        waits.append([])
        for layer in range(layers):
            begun.begin_layer(layer, [], q)
            begun.attend(q, k, v)
            waits[-1].append([each for each in asked])
            asked.clear()
        begun.end(q.flatten(0, 1).clone(), q)
        assert run.state() is not None and not asked, "nor does whoever keeps what was learnt"
    calls = [1 + step for step in range(3)]
    print(waits)
    assert not any(waits[0])
    for call, made in zip(calls, waits[1:], strict=False):
        # the layers that were sent together, of which the first is at most a quarter of a pass before
        assert made == [[f"{call}: {layer // 2 * 2}"] for layer in range(layers)]


def true_errors(run: AttentionRun, q: Tensor, k: Tensor, v: Tensor, steps: int) -> list[float]:
    """Of all rows and heads of a layer of one call after the other, by the definition of attention."""
    exact, errors = plain_attention(q, k, v), []
    for step in range(steps):
        begun = begun_pass(run, q.shape[1], step)
        begun.begin_layer(0, [], q)
        errors.append(relative_error(begun.attend(q, k, v), exact))
        begun.end(q.flatten(0, 1).clone(), q)
    return errors


@pytest.mark.parametrize("bound", [0.05, 0.15])
def test_errors_come_under_the_bound_by_what_was_measured(bound: float) -> None:
    """q, k and v as they are, step after step: tau finds a place where the true error is under the bound, or none."""
    run = sparse_run(replace(ALWAYS, tau=2.0, bound=bound), layers=1, heads=5)
    errors = true_errors(run, *planted(640, heads=5), steps=8)
    print(f"bound {bound}: true errors {[round(error, 3) for error in errors]} to tau {run.chosen(0)}")
    assert all(error < bound for error in errors[-3:])
    assert (run.chosen(0) is None) == (bound == 0.05)  # nothing that is left out keeps it: it is dense
    readings = run.readings()
    assert [each.step for each in readings] == list(range(8))
    assert readings[0].density is not None and 0 < readings[0].density < 1
    print("\n".join(table(readings)))


@pytest.mark.parametrize("mode", PRESETS)
@pytest.mark.parametrize("alike", [0.6, 0.9])
def test_after_its_first_excess_a_layer_is_within_its_bound(mode: str, alike: float) -> None:
    """Of layers whose attention is spread, so that little may be left out, and gathered, so that most may."""
    settings = replace(PRESETS[mode], dense_percent=0, dense_layers=0, min_tokens=0)
    run = sparse_run(settings, layers=1, heads=2)
    errors = true_errors(run, *planted(960, heads=2, groups=15, length_of_group=64, alike=alike), steps=10)
    readings = run.readings()
    over = [each.step for each in readings if each.error is not None and each.error > (settings.bound or 0)]
    print(mode, alike, [round(error, 3) for error in errors], over, [round(each.density or 1, 2) for each in readings])
    for step in over:
        assert errors[step + 1] < 1e-5, "the next call is exact"
    after = errors[over[0] + 1 :] if over else errors
    assert all(error < (settings.bound or 0) for error in after)
    densities = [each.density or 1 for each in readings]
    if alike == 0.9:
        assert densities[0] > 0.5 and densities[-1] < 0.25 and run.chosen(0) == (settings.tau, 0.0)


def test_a_run_that_is_stopped_at_an_excess_goes_on_alike() -> None:
    """Between any two calls: what is kept tells that a layer is exact next, or was."""
    settings = replace(PRESETS["balanced"], dense_percent=0, dense_layers=0, min_tokens=0)
    good, bad = (planted(640, heads=2, groups=10, length_of_group=64, alike=alike) for alike in (0.9, 0.0))
    whole = sparse_run(settings, layers=1, heads=2)
    made = list[tuple[list[BlockChoice], list[BlockChoice]]]()
    for step in range(7):
        learnt = whole.state()
        again = sparse_run(settings, layers=1, heads=2)
        assert learnt is not None
        again.restore(learnt)
        made.append((calls_with(whole, step, *(bad if step == 3 else good)), calls_with(again, step, *good)))
    assert [one for one, _ in made] == [other for _, other in made]
    assert [len(one) for one, _ in made] == [2, 2, 2, 2, 0, 2, 2]


def calls_with(run: AttentionRun, step: int, q: Tensor, k: Tensor, v: Tensor) -> list[BlockChoice]:
    """What was left out of the two passes of a call: the prompt's and the negative one's."""
    assert isinstance(run.sparse, Sol)
    before = len(run.sparse.calls)
    run.begin_step(step, 20)
    for keys in (k, 1.1 * k):
        begun = run.begin_pass(q.shape[1], CPU)
        assert begun is not None
        begun.order = TokenOrder.of(torch.arange(q.shape[1]))
        begun.begin_layer(0, [], q)
        begun.attend(q, keys, v)
        begun.end(q.flatten(0, 1).clone(), q)
    return run.sparse.calls[before:]


# --- the sampling


@pytest.mark.parametrize("length, heads, seed", [(640, 10, 0), (1000, 5, 1), (1300, 5, 2)])
@pytest.mark.parametrize("blocks", [BlockChoice(tau=1.0), BlockChoice(top_k=0.15, sinks=(0, 2))])
def test_measured_errors_are_the_true_ones_within_20_percent(
    length: int, heads: int, seed: int, blocks: BlockChoice
) -> None:
    """Over the few steps by which the bound follows, of all rows and heads."""
    q, k, v = planted(length, heads, seed)
    out, dense = Sol().attend(q, k, v, blocks), plain_attention(q, k, v)
    true = relative_error(out, dense)
    arguments = {"tau": blocks.tau, "topk_ratio": blocks.top_k, "sink_blocks": blocks.sinks, "sink_q": (0, 0)}
    density = float(chosen(q.double(), k.double(), arguments).float().mean())
    sums = torch.stack([compare(q[0], k[0], v[0], out[0], Samples(CPU, step), blocks) for step in range(4)]).sum(0)
    measured, seen = math.sqrt(sums[0] / sums[1]), float(sums[2] / 4)
    print(
        f"{length} tokens, {blocks}: true {true:.4f}, measured {measured:.4f}; density {density:.3f}, seen {seen:.3f}"
    )
    assert measured == pytest.approx(true, rel=0.2)
    assert seen == pytest.approx(density, rel=0.15)


def test_what_is_exact_has_no_error() -> None:
    q, k, v = planted(333, 3)
    sums = compare(q[0], k[0], v[0], plain_attention(q, k, v).float()[0], Samples(CPU, 0))
    assert math.sqrt(sums[0] / sums[1]) < 1e-5 and float(sums[2]) == 1.0


def test_other_rows_and_heads_are_looked_at_every_time() -> None:
    samples = [Samples(CPU, seed) for seed in (1, 1, 2)]
    rows = [each.rows(1000) for each in samples]
    assert rows[0].equal(rows[1]) and not rows[0].equal(rows[2]) and not samples[0].rows(1000).equal(rows[0])
    assert {samples[0].heads(40).start for _ in range(7)} == set(range(7))
    assert samples[0].heads(1) == slice(0, 1, 7)


@torch.inference_mode()
def test_an_inexact_backend_is_watched_too() -> None:
    class Noisy(Sdpa):
        name, exact = "noisy", False

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = super().attend(q, k, v)
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            return out + 0.05 * noise * out.norm() / noise.norm()

    backend = Noisy(CPU)
    model = wan(None)
    watch = AttentionRun(backend, 3, 1)
    model.execution = replace(model.execution, attention=backend, watch=watch)
    model(*wan_inputs())
    found = watch.readings()
    assert [each.layer for each in found] == [0, 1, 2] and not any(each.sparse for each in found)
    for each in found:
        assert each.error == pytest.approx(0.05, rel=0.25)


@torch.inference_mode()
def test_calls_that_exact_attention_makes_are_not_looked_at() -> None:
    """What looks at them has keys and values in fp32, for which no plan leaves room beside exact attention."""

    class Spared(Sdpa):
        exact, workspace = False, AttentionWorkspace(per_key=5.0, spared=AttentionWorkspace())

    backend, model = Spared(CPU), wan(None)
    model.execution = replace(model.execution, attention=backend, watch=AttentionRun(backend, 3, 1))
    latent, *others = wan_inputs()
    model(latent, *others)
    assert model.execution.watch is not None
    assert [each.error for each in model.execution.watch.readings()] == [None] * 3


@torch.inference_mode()
def test_the_samplings_memory_is_within_what_is_planned() -> None:
    """Bytes of keys and values in fp32, and of scores, of one head in seven, beside the kernel's own of all."""
    tokens, heads = 32760, 40
    said = run_module.LargerOf((AttentionWorkspace(per_query=1.4, per_key=2.6, per_row=1.0),))
    looked = math.ceil(heads / 7) * (2 * 4 * 128 * tokens + 3 * 4 * 32 * tokens)
    assert looked < said.nbytes(tokens, tokens, heads, 128)


# --- runs


@contextmanager
def with_kernel(make: Callable[[AttentionSpec], Sol]) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attending, "select_sparse", make)
        yield patch


RUN = SparseSettings(tau=0.5, bound=0.3, dense_percent=25, dense_layers=1, min_tokens=0)


class Latents(WanPipeline):
    """Gives latents in place of frames."""

    def _decode(self, latent: Tensor, plan: MemoryPlan) -> Iterator[Tensor]:
        yield latent


def long_video(num_steps: int) -> WanRequest:
    """320 tokens: five blocks."""
    return replace(REQUEST, num_steps=num_steps, width=128, height=128, num_frames=17)


def test_a_run_is_sparse_after_its_first_steps_and_reports_it(tmp_path: Path) -> None:
    files, kernel = tiny.save_files(tmp_path), Sol()
    request = long_video(4)
    with with_kernel(lambda spec: kernel):
        pipeline = Latents(files, RunSettings(sparse=RUN))
        list(pipeline.generate(request))
    passes = 2 if request.guidance != 1 else 1
    assert len(kernel.calls) == 3 * passes * 2  # three steps, two layers of three
    report = pipeline.report()
    print(report.table())
    sparse = [each for each in report.attention if each.sparse]
    assert {each.step for each in sparse} == {1, 2, 3} and {each.layer for each in sparse} == {1, 2}
    assert all(each.error is not None and 0 < each.error < 0.5 for each in sparse)
    assert all(each.density is not None and 0 < each.density < 1 for each in sparse)
    assert "density" in report.table() and "step 2" in report.table()


def test_without_a_bound_the_report_tells_times_and_claims_no_density() -> None:
    run, (q, k, v) = sparse_run(replace(ALWAYS, dense_layers=1), layers=2), planted(320, heads=1)
    begun = begun_pass(run, 320, 0)
    for layer in range(2):
        begun.begin_layer(layer, [], q)
        begun.attend(q, k, v)
    begun.end(q.flatten(0, 1).clone(), q)
    readings = run.readings()
    assert [(each.sparse, each.error, each.density) for each in readings] == [(False, None, 1.0), (True, None, None)]
    lines = table(readings)
    print("\n".join(lines))
    assert len(lines) == 2 and lines[1].split()[:6] == ["step", "1", "1", "-", "-", "-"]
    assert float(lines[1].split()[6]) > 0


def test_the_report_tells_of_every_layer_and_of_each_model_by_itself() -> None:
    """Two experts have layers of one number each."""
    high = [
        LayerReading(step, layer, layer > 0, 0.01 * layer or None, 1.0, 0.5) for step in (0, 1) for layer in range(6)
    ]
    low = [LayerReading(2, layer, True, 0.2, 0.25, 0.1, 0.4, model=1) for layer in range(2)]
    lines = [line.split() for line in table([*high, *low])]
    titles = [" ".join(line[:2]) for line in lines if line[0] != "attention"]
    assert titles == [
        "step 1", "step 2", *(f"layer {layer}" for layer in range(6)), "step 3", "layer 0", "layer 1"
    ]  # fmt: skip
    assert lines[3][2:] == ["0", "-", "-", "1.00", "1.000", "-"], "exact by its settings"
    assert lines[8][2:] == ["2", "0.050", "0.050", "1.00", "1.000", "-"]
    assert lines[-1][2:] == ["1", "0.200", "0.200", "0.25", "0.100", "0.400"]
    assert table([LayerReading(0, 0, False, None, 1.0, 0.5)]) == []


def test_both_experts_of_a_run_are_told_apart(tmp_path: Path) -> None:
    files = replace(tiny.save_files(tmp_path), model_low=tiny.save_wan(tmp_path / "low.safetensors"))
    with with_kernel(Sol):
        pipeline = Latents(files, RunSettings(sparse=replace(RUN, dense_percent=0)))
        list(pipeline.generate(replace(long_video(4), boundary=0.9)))
    assert {each.model for each in pipeline.report().attention} == {0, 1}


@pytest.mark.parametrize(
    "flags, message",
    [("--sparse balanced --sparse-value 0.5", "--sparse-value says nothing with --sparse balanced"),
     ("--sparse-value 0.5", "--sparse-value says nothing without --sparse"),
     ("--sparse-min-tokens 0", "--sparse-min-tokens says nothing without --sparse"),
     ("--step-cache first_block --step-cache-table wan2.1_t2v_14B", "--step-cache-table says nothing with --step-cache "
      "first_block")],
)  # fmt: skip
def test_a_flag_that_would_change_nothing_is_refused(flags: str, message: str) -> None:
    parser = ArgumentParser()
    add_sparse(parser)
    add_step_cache(parser)
    options = parser.parse_args(flags.split())
    with pytest.raises(ValueError, match=message):
        (step_cache_of(options), sparse_of(options))


def test_flags_are_settings() -> None:
    parser = ArgumentParser()
    add_sparse(parser)
    words = "--sparse top_k --sparse-value 0.15 --sparse-bound 0.3 --sparse-dense-layers 0"
    options = parser.parse_args(words.split())
    assert sparse_of(options) == SparseSettings(top_k=0.15, bound=0.3, dense_layers=0)
    assert sparse_of(parser.parse_args(["--sparse", "fast"])) == PRESETS["fast"]


def test_a_bound_of_0_is_the_exact_run(tmp_path: Path) -> None:
    files = tiny.save_files(tmp_path)
    request = replace(REQUEST, num_steps=2)
    made = [
        torch.cat(list(Latents(files, RunSettings(sparse=sparse)).generate(request)))
        for sparse in (None, replace(RUN, bound=0.0, dense_percent=0))
    ]
    assert made[0].equal(made[1])
    model = StreamedWan(files.model, RunSettings(sparse=replace(RUN, bound=0.0)))
    assert model.arithmetic == StreamedWan(files.model, RunSettings()).arithmetic


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """What was learnt of the error goes on with it: the next step's tau depends on it."""
    files, runs = tiny.save_files(tmp_path), tmp_path / "runs"
    request = long_video(5)
    settings = RunSettings(sparse=replace(RUN, tau=1.5, bound=0.2, dense_percent=0))

    class Stopped(Exception):
        pass

    class StoppedAtTheFourth(Latents):
        def _at_step(self, step: int, num_steps: int) -> None:
            if step == 3:
                raise Stopped
            super()._at_step(step, num_steps)

    with with_kernel(Sol):
        first = Latents(files, settings)
        whole = torch.cat(list(first.generate(request)))
        learnt = first.high.learnt()
        with pytest.raises(Stopped):
            list(StoppedAtTheFourth(files, settings, runs=runs).generate(request))
        again = Latents(files, settings, runs=runs)
        assert torch.cat(list(again.generate(request))).equal(whole)
        assert again.steps is not None
    assert first.high.model.execution.watch is not None
    start = sparse_run(settings.sparse or RUN).state()
    assert learnt[0].equal(again.high.learnt()[0]) and not learnt[0].equal(start)


def test_other_sparse_settings_are_another_run(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    with with_kernel(Sol):
        arithmetics = [
            StreamedWan(path, RunSettings(sparse=each)).arithmetic for each in (None, RUN, replace(RUN, tau=0.7))
        ]
    assert "sparse" not in arithmetics[0]
    assert len({arithmetic.get("sparse") for arithmetic in arithmetics}) == 3


def test_sparse_attention_plans_for_all_queries_at_once(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    with with_kernel(Sol):
        model = StreamedWan(path, RunSettings(sparse=RUN))
    assert not model.footprint().streams_queries and not model.footprint().packs_keys
    assert model.model.workspace(1000, CPU).query_rows == 1000
    model.use_sparse(None)
    assert model.footprint().streams_queries


def test_the_safe_path_is_dense(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    with with_kernel(Sol):
        model = StreamedWan(path, RunSettings(attention_mode="sdpa", sparse=RUN))
        assert "sparse attention" in model.likely_cause()
        assert model.take_safe_path() and not model.model.execution.is_sparse
        assert not model.take_safe_path()


def test_where_it_cannot_run_it_says_so(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match=r"sparse attention .sol_attn. cannot run .* needs an NVIDIA GPU"):
        StreamedWan(path, RunSettings(sparse=RUN))


@pytest.mark.parametrize(
    "change, message",
    [({"tau": 9.0}, "tau is 9"), ({"top_k": 1.5}, "top_k is 1.5"), ({"bound": -0.1}, "error_bound is -0.1"),
     ({"dense_percent": 101}, "dense_percent is 101"), ({"dense_layers": -1}, "dense_layers is -1"),
     ({"tau": math.nan}, "tau is nan")],
)  # fmt: skip
def test_settings_out_of_range_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["balanced"], **change)
