"""The FramePack transformer against diffusers' HunyuanVideoFramepackTransformer3DModel with the same weights, fp32."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from lowvram_video.framepack.network.blocks import DoubleBlock, FramePackBlock, SingleBlock
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel, Frames, History, Prompt, StepCondition
from lowvram_video.fused.eager import EagerOps
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.transformer import Block
from lowvram_video.transformer.workspace import Workspace
from lowvram_video.weights.linear.int8 import Int8Matmul
from lowvram_video.weights.linear.linear import Linear
from torch import Tensor, nn

TINY = FramePackConfig(
    num_heads=2, head_dim=16, num_layers=2, num_single_layers=2, text_dim=24, pooled_dim=12, image_dim=20,
    rope_axes=(4, 6, 6),
)  # fmt: skip
GUIDANCE = 10000.0
MODULATION = ("norm1.linear.", "norm1_context.linear.", "norm.linear.")


@dataclass(frozen=True)
class Inputs:
    """What both models are given; `missing` names parts of the history that are left out."""

    noisy: Frames
    clean: Frames
    twice: Frames
    four: Frames
    text: Tensor  # [1, L, text_dim], of which `num_text` count
    num_text: int
    pooled: Tensor
    image: Tensor  # [1, m, image_dim]
    missing: frozenset[str] = frozenset()

    def history(self) -> History:
        parts = {"clean": self.clean, "twice": self.twice, "four": self.four}
        return History(**{name: frames for name, frames in parts.items() if name not in self.missing})

    def prompt(self) -> Prompt:
        return Prompt(self.text[:, : self.num_text], self.pooled)


def reference_of(
    config: FramePackConfig, seed: int = 1, spread: float = 0.2
) -> HunyuanVideoFramepackTransformer3DModel:
    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.num_layers,
        num_single_layers=config.num_single_layers,
        num_refiner_layers=config.num_refiner_layers,
        mlp_ratio=config.mlp_ratio,
        patch_size=config.patch_size[1],
        patch_size_t=config.patch_size[0],
        guidance_embeds=True,
        text_embed_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        rope_theta=config.rope_theta,
        rope_axes_dim=config.rope_axes,
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=config.image_dim,
        has_clean_x_embedder=True,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    reference = model.eval().float().requires_grad_(False)
    reference.generator = generator  # the published figures draw their inputs from it
    return reference


def ours_of(config: FramePackConfig, reference: nn.Module) -> FramePackModel:
    model = FramePackModel(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in reference.state_dict().items()}, assign=True)
    return model.requires_grad_(False)


def tiny_inputs(generator: torch.Generator) -> Inputs:
    """Those of the published figures, in the order in which they are drawn."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    start, _, noisy, near, twice, four = torch.arange(26).split([1, 3, 3, 1, 2, 16])
    latents = [draw(1, 16, frames, 10, 6) for frames in (3, 2, 2, 16)]
    places = (noisy, torch.cat([start, near]), twice, four)
    parts = [Frames(latent, index) for latent, index in zip(latents, places, strict=True)]
    return Inputs(*parts, text=draw(1, 9, 24), num_text=6, pooled=draw(1, 12), image=draw(1, 5, 20))


def run_reference(reference: nn.Module, inputs: Inputs, timestep: float) -> Tensor:
    mask = (torch.arange(inputs.text.shape[1]) < inputs.num_text).float()[None]
    with leaving_out(reference, inputs.missing):
        return reference(
            hidden_states=inputs.noisy.latents,
            timestep=torch.tensor([timestep]),
            encoder_hidden_states=inputs.text,
            encoder_attention_mask=mask,
            pooled_projections=inputs.pooled,
            image_embeds=inputs.image,
            indices_latents=inputs.noisy.indices,
            guidance=torch.tensor([GUIDANCE]),
            latents_clean=inputs.clean.latents,
            indices_latents_clean=inputs.clean.indices,
            latents_history_2x=inputs.twice.latents,
            indices_latents_history_2x=inputs.twice.indices,
            latents_history_4x=inputs.four.latents,
            indices_latents_history_4x=inputs.four.indices,
            return_dict=False,
        )[0]


@contextmanager
def leaving_out(reference: nn.Module, missing: frozenset[str]) -> Iterator[None]:
    """Its packing skips what is None, but its forward wants all parts: they are taken away in between."""
    pack = reference._pack_history_states
    places = {"clean": 1, "twice": 2, "four": 3}

    def packed(*arguments: Any) -> Any:
        kept = list(arguments)
        for name in missing:
            kept[places[name]] = None
        return pack(*kept)

    reference._pack_history_states = packed
    try:
        yield
    finally:
        reference._pack_history_states = pack


def run_ours(model: FramePackModel, inputs: Inputs, timestep: float, cache: Any = None) -> Tensor:
    (condition,) = model.conditions(inputs.prompt(), torch.tensor([timestep]), GUIDANCE)
    return model(inputs.noisy, inputs.history(), condition, model.embed_image(inputs.image), cache)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, FramePackModel, Inputs]:
    reference = reference_of(TINY)
    return reference, ours_of(TINY, reference), tiny_inputs(reference.generator)


def test_velocity_is_the_published_one(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    reference, model, inputs = tiny
    want, got = run_reference(reference, inputs, 437.5), run_ours(model, inputs, 437.5)
    error = relative(got, want)
    print(f"mean {got.mean():.7f}, std {got.std():.7f}; against diffusers: max relative error {error:.2e}")
    assert got.shape == (1, 16, 3, 10, 6)
    # of one processor: on another one the random weights and the reference's own products round otherwise (5e-5 seen)
    assert float(got.mean()) == pytest.approx(1.0399456, rel=1e-4)
    assert float(got.std()) == pytest.approx(3.6813152, rel=1e-4)
    assert got.flatten()[:4].tolist() == pytest.approx([4.4606423, 2.8179073, 4.3653250, 2.8205264], rel=1e-4)
    assert error <= 1e-5


def random_case(seed: int) -> tuple[FramePackConfig, Inputs]:
    pick = random.Random(seed)
    axes = pick.choice([(4, 6, 6), (2, 4, 6), (8, 4, 4)])
    config = replace(
        TINY,
        num_heads=pick.randint(1, 3),
        head_dim=sum(axes),
        rope_axes=axes,
        num_layers=pick.randint(1, 2),
        num_single_layers=pick.randint(1, 2),
        num_refiner_layers=pick.randint(1, 2),
        mlp_ratio=pick.choice([2.0, 4.0, 7.0]),
        in_channels=4,
        out_channels=pick.choice([4, 3]),
    )
    generator = torch.Generator().manual_seed(seed)
    size = (2 * pick.randint(2, 7), 2 * pick.randint(2, 7))

    def frames(most: int) -> Frames:
        count = pick.randint(1, most)
        places = torch.randperm(30, generator=generator)[:count].sort().values
        return Frames(torch.randn(1, 4, count, *size, generator=generator), places)

    parts = [frames(4), frames(3), frames(5), frames(9)]
    length = pick.randint(1, 9)
    return config, Inputs(
        *parts,
        text=torch.randn(1, length, config.text_dim, generator=generator),
        num_text=pick.randint(1, length),
        pooled=torch.randn(1, config.pooled_dim, generator=generator),
        image=torch.randn(1, pick.randint(1, 6), config.image_dim, generator=generator),
        missing=frozenset(name for name in ("clean", "twice", "four") if pick.random() < 0.3),
    )


@pytest.mark.parametrize("seed", range(16))
def test_velocity_equals_diffusers(seed: int) -> None:
    config, inputs = random_case(seed)
    reference = reference_of(config, seed)
    model, timestep = ours_of(config, reference), 1000 * random.Random(seed).random()
    chunk, groups = random.Random(seed).choice([(5, 2), (16, 1), (1000, 3)])
    model.execution = Execution(token_chunk=chunk, head_groups=groups)
    error = relative(run_ours(model, inputs, timestep), run_reference(reference, inputs, timestep))
    size, missing = tuple(inputs.noisy.latents.shape[2:]), ", ".join(sorted(inputs.missing)) or "nothing"
    print(f"{config.num_heads} heads of {config.head_dim}, {size}, without {missing}: max relative error {error:.2e}")
    assert error <= 1e-5


@pytest.mark.parametrize(("token_chunk", "head_groups"), [(7, 1), (64, 2), (1000, 2)])
def test_chunks_change_nothing_but_rounding(
    tiny: tuple[nn.Module, FramePackModel, Inputs], token_chunk: int, head_groups: int
) -> None:
    _, model, inputs = tiny
    want = run_ours(model, inputs, 437.5)
    model.execution = Execution(token_chunk=token_chunk, head_groups=head_groups)
    try:
        error = relative(run_ours(model, inputs, 437.5), want)
    finally:
        model.execution = Execution()
    print(f"chunks of {token_chunk}, {head_groups} groups of heads: max relative error {error:.2e}")
    assert error < 2e-6


@pytest.mark.parametrize("token_chunk", [4096, 13])  # all steps at once, or two
def test_conditions_of_all_steps_equal_those_of_each(
    tiny: tuple[nn.Module, FramePackModel, Inputs], token_chunk: int
) -> None:
    _, model, inputs = tiny
    timesteps = torch.tensor([1000.0, 437.5, 20.25])
    each = [model.conditions(inputs.prompt(), timesteps[i : i + 1], GUIDANCE)[0] for i in range(3)]
    model.execution = Execution(token_chunk=token_chunk)
    try:
        together = model.conditions(inputs.prompt(), timesteps, GUIDANCE)
    finally:
        model.execution = Execution()
    assert [len(one.blocks) for one in together] == [4, 4, 4]
    assert [tuple(tensor.shape) for tensor in together[0].blocks] == [(12, 32), (12, 32), (3, 32), (3, 32)]
    error = 0.0
    for one, want in zip(together, each, strict=True):
        pairs = zip((one.text, *one.blocks, one.head), (want.text, *want.blocks, want.head), strict=True)
        error = max(error, *(relative(got, tensor) for got, tensor in pairs))
    print(f"three steps at once: max relative error {error:.2e}")
    assert error < 2e-6
    assert relative(together[0].text, together[1].text) > 1e-3  # the text is refined for its step


class ScriptedCache:
    """Says what it is told to, and keeps what it is shown."""

    probes = False

    def __init__(self, *answers: bool):
        self.answers, self.signals = list(answers), list[Tensor]()
        self.residual: Tensor | None = None

    def reuse(self, signal: Tensor) -> bool:
        self.signals.append(signal.clone())
        return self.answers.pop(0)

    def room(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device) if self.residual is None else self.residual


def no_blocks(blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    raise AssertionError("a reused step asks for blocks")


def test_step_cache_skips_the_blocks_and_adds_what_they_added(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    reference, model, inputs = tiny
    normed: list[Tensor] = []
    hook = reference.transformer_blocks[0].norm1.register_forward_hook(lambda _, given, out: normed.append(out[0]))
    want = run_reference(reference, inputs, 437.5)
    hook.remove()
    cache = ScriptedCache(False, True, True)
    assert torch.equal(run_ours(model, inputs, 437.5, cache), run_ours(model, inputs, 437.5))
    signal_error = relative(cache.signals[0], normed[0][0])
    residual = cache.residual
    assert residual is not None and residual.shape == (3 * 5 * 3, 32)

    model.stream = no_blocks
    try:
        error = relative(run_ours(model, inputs, 437.5, cache), want)
        other = replace(inputs, noisy=replace(inputs.noisy, latents=inputs.noisy.latents + 0.3))
        got = run_ours(model, other, 402.0, cache)
        assert relative(got, want) > 1e-3
    finally:
        model.stream = iter
    # another step: the reference's own ends around what the blocks added before
    skip = reference.norm_out.register_forward_pre_hook(
        lambda _, given: (reference.x_embedder(other.noisy.latents) + residual, given[1])
    )
    later = relative(got, run_reference(reference, other, 402.0))
    skip.remove()
    print(f"signal {signal_error:.2e}, same step {error:.2e}, another step {later:.2e}: max relative errors")
    assert max(signal_error, error, later) <= 1e-5
    assert torch.equal(cache.residual, residual)


def test_a_computed_step_writes_its_residual_over_the_last_one(
    tiny: tuple[nn.Module, FramePackModel, Inputs],
) -> None:
    _, model, inputs = tiny
    cache, fresh = ScriptedCache(False, False), ScriptedCache(True)
    run_ours(model, inputs, 900.0, cache)
    place = cache.residual.data_ptr()
    run_ours(model, inputs, 437.5, cache)
    run_ours(model, inputs, 437.5, fresh)  # says "reuse" when there is nothing yet
    assert cache.residual.data_ptr() == place
    assert torch.equal(cache.residual, fresh.residual)


@dataclass
class Home:
    """Blocks whose weights are there only while their turn lasts, and only those that `wanted` says."""

    model: FramePackModel
    names: Callable[[str], bool]

    def __post_init__(self) -> None:
        blocks = self.model.ordered_blocks().values()
        self.weights = [
            {name: tensor for name, tensor in block.state_dict().items() if self.names(name)} for block in blocks
        ]
        self.visited = 0
        for block in blocks:
            block.to("meta")

    def __call__(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        for block, weights in zip(blocks, self.weights, strict=True):
            block.load_state_dict(weights, strict=False, assign=True)
            self.visited += 1
            yield block
            block.to("meta")


def test_blocks_stream_and_a_pass_needs_no_modulation_weights(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    reference, model, inputs = tiny
    want = run_ours(model, inputs, 437.5)
    model = ours_of(TINY, reference)
    visitor = Home(ours_of(TINY, reference), lambda name: name.startswith(MODULATION))

    def visit(make: Callable[[Block], Tensor]) -> list[Tensor]:
        return [make(block) for block in visitor(list(visitor.model.ordered_blocks().values()))]

    (condition,) = visitor.model.conditions(inputs.prompt(), torch.tensor([437.5]), GUIDANCE, visit)
    image = visitor.model.embed_image(inputs.image)
    model.stream = home = Home(model, lambda name: not name.startswith(MODULATION))
    for name in ("time_text_embed", "context_embedder", "image_projection", "norm_out"):
        getattr(model, name).to("meta")
    got = model(inputs.noisy, inputs.history(), condition.to(torch.device("cpu")), image)
    assert torch.equal(got, want)
    assert (visitor.visited, home.visited) == (4, 4)
    assert all(tensor.is_meta for block in model.ordered_blocks().values() for tensor in block.parameters())


def workspaces_of(model: FramePackModel) -> list[Workspace]:
    """Those of the passes to come."""
    made: list[Workspace] = []
    make = model.workspace

    def remembered(num_rows: int, device: torch.device, part: Any = None) -> Workspace:
        made.append(make(num_rows, device, part))
        return made[-1]

    model.workspace = remembered
    return made


@pytest.mark.parametrize(("stored", "bound"), [(torch.bfloat16, 2e-2), (torch.float8_e4m3fn, 0.5)])
def test_unpacked_weights_stay_within_their_bound(stored: torch.dtype, bound: float) -> None:
    reference = reference_of(TINY, spread=0.1)
    model, inputs = ours_of(TINY, reference), tiny_inputs(reference.generator)
    want = run_ours(model, inputs, 437.5)
    for block in model.ordered_blocks().values():
        for layer in block.modules():
            if isinstance(layer, Linear):
                layer.weight = nn.Parameter(layer.weight.to(stored), requires_grad=False)
    model.execution = Execution(token_chunk=16)  # several groups of rows
    made = workspaces_of(model)
    error = float((run_ours(model, inputs, 437.5) - want).norm() / want.norm())
    dim, mlp_dim = TINY.dim, TINY.mlp_dim
    assert DoubleBlock(TINY).to(stored).scratch_elements(torch.float32) == max(3 * dim**2, dim * mlp_dim)
    assert SingleBlock(TINY).to(stored).scratch_elements(torch.float32) == dim * (dim + mlp_dim)
    assert DoubleBlock(TINY).scratch_elements(torch.float32) == 0
    (work,) = made
    print(f"{stored}: relative error {error:.2e}, {work.scratch.buffer.numel()} elements of scratch")
    assert work.scratch.buffer.numel() == model.scratch_elements() == dim * (dim + mlp_dim)  # it never had to grow
    assert 0 < error < bound


def test_long_sequences_take_no_more_than_q_k_and_v(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    reference, _, inputs = tiny
    model = ours_of(TINY, reference)
    model.execution = Execution(token_chunk=16)
    made = workspaces_of(model)
    run_ours(model, inputs, 437.5)
    model.execution = Execution(token_chunk=1000)
    run_ours(model, inputs, 437.5)
    long, short = made
    rows = 2 * 5 * 3 + 1 * 3 * 2 + 4 * 2 * 1 + 3 * 5 * 3 + 5 + 6
    assert long.num_rows == short.num_rows == rows
    assert long.pool.numel() == 3 * rows * TINY.dim and 16 < long.joined_rows < rows
    # one chunk at least: a short one is larger, by what rows of attention and MLP take beyond k and v
    assert short.pool.numel() == rows * TINY.dim + rows * (TINY.dim + TINY.mlp_dim) and short.joined_rows == rows


class CountedOps(EagerOps):
    """Tells how many rows were normed."""

    normed = 0

    def modulated_norm(self, x: Tensor, *args: Any) -> Tensor:
        self.normed += x.shape[0]
        return super().modulated_norm(x, *args)


@pytest.mark.parametrize("head_groups", [1, 2])
def test_single_blocks_norm_their_rows_once_where_there_is_room(
    tiny: tuple[nn.Module, FramePackModel, Inputs], head_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _, inputs = tiny
    model = ours_of(TINY, reference)

    def run() -> tuple[Tensor, int, int]:
        ops = CountedOps()
        model.execution = Execution(token_chunk=1000, head_groups=head_groups, ops=ops)
        made = workspaces_of(model)
        velocity = run_ours(model, inputs, 437.5)
        return velocity, ops.normed, made[0].num_rows

    velocity, normed, rows = run()
    monkeypatch.setattr(Workspace, "kept_rows", None)
    again, normed_again, _ = run()
    assert torch.equal(velocity, again)
    assert normed_again - normed == TINY.num_single_layers * rows


def test_kept_rows_are_nobody_elses(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    reference, _, inputs = tiny
    model = ours_of(TINY, reference)
    for chunk, there in ((1000, True), (16, False)):
        model.execution = Execution(token_chunk=chunk)
        made = workspaces_of(model)
        run_ours(model, inputs, 437.5)
        work = made[-1]
        kept = work.kept_rows
        assert (kept is not None) == there
        if kept is not None:
            work.pool.zero_()
            kept.fill_(1)
            assert not any(rows.any() for rows in (work.queries, work.keys, work.values, work.hidden_after_q))
            assert work.hidden_after_q.shape[0] == work.num_rows


def quantise_int8(layer: Linear) -> None:
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    values = (layer.weight / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.register_buffer("weight_scale", scale)
    layer.format = Int8Matmul()


def test_eight_bit_products_run_in_every_layer() -> None:
    reference = reference_of(TINY, spread=0.1)
    model, inputs = ours_of(TINY, reference), tiny_inputs(reference.generator)
    want = run_ours(model, inputs, 437.5)
    for block in model.ordered_blocks().values():
        for layer in [layer for layer in block.modules() if isinstance(layer, Linear)]:
            quantise_int8(layer)
    whole = run_ours(model, inputs, 437.5)
    model.execution = Execution(token_chunk=16, head_groups=2)
    error = float((whole - want).norm() / want.norm())
    chunked = relative(run_ours(model, inputs, 437.5), whole)
    print(f"int8: relative error {error:.2e}; in chunks against whole {chunked:.2e}")
    assert 0 < error < 0.05
    # rows are quantised one by one: chunks change rounding only, which may turn a number to the next integer
    assert chunked < 0.02


@pytest.mark.parametrize("index", [0, -1], ids=["double", "single"])
def test_blocks_compile_into_one_graph(tiny: tuple[nn.Module, FramePackModel, Inputs], index: int) -> None:
    reference, _, inputs = tiny
    model = ours_of(TINY, reference)
    model.execution = Execution(token_chunk=64)
    want = run_ours(model, inputs, 437.5)
    block: FramePackBlock = list(model.ordered_blocks().values())[index]
    block.compile(backend="aot_eager", fullgraph=True)
    error = relative(run_ours(model, inputs, 437.5), want)
    print(f"compiled: max relative error {error:.2e}")
    assert error < 2e-6


def test_what_does_not_suit_the_model_is_refused(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    _, model, inputs = tiny
    (condition,) = model.conditions(inputs.prompt(), torch.tensor([437.5]), GUIDANCE)

    def refuse(message: str, noisy: Frames, history: History) -> None:
        with pytest.raises(ValueError, match=message):
            model(noisy, history, condition)

    noisy, history = inputs.noisy, inputs.history()
    latents, places = noisy.latents, noisy.indices
    refuse(r"the noise has 15 channels but this FramePack model takes 16", Frames(latents[:, 1:], places), history)
    refuse(r"\(3, 9, 6\).*the noise is not divisible", Frames(latents[:, :, :, 1:], places), history)
    refuse(r"the noise has 3 frames but indices of shape \(2,\)", Frames(latents, places[1:]), history)
    refuse(r"the noise is a batch of 2", Frames(latents.repeat(2, 1, 1, 1, 1), places), history)
    narrow = replace(history, twice=Frames(inputs.twice.latents[..., 2:], inputs.twice.indices))
    refuse(r"history at 1/2 has latents of \(height, width\) \(10, 4\) but the noise of \(10, 6\)", noisy, narrow)
    with pytest.raises(ValueError, match=r"\(1, 0, 24\); expected \(1, tokens, 24\).*at least one token"):
        model.conditions(Prompt(inputs.text[:, :0], inputs.pooled), torch.tensor([437.5]), GUIDANCE)


def test_without_a_picture_only_the_text_is_read(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    reference, model, inputs = tiny
    (condition,) = model.conditions(inputs.prompt(), torch.tensor([437.5]), GUIDANCE)
    want = run_reference(reference, replace(inputs, image=inputs.image[:, :0]), 437.5)
    error = relative(model(inputs.noisy, inputs.history(), condition), want)
    print(f"no picture: max relative error {error:.2e}")
    assert error <= 1e-5


def test_a_condition_keeps_its_parts_when_it_is_moved(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    _, model, inputs = tiny
    (condition,) = model.conditions(inputs.prompt(), torch.tensor([437.5]), GUIDANCE)
    moved: StepCondition = condition.to(torch.device("meta"))
    assert moved.text.is_meta and moved.head.is_meta and all(tensor.is_meta for tensor in moved.blocks)
    assert [tensor.shape for tensor in moved.blocks] == [tensor.shape for tensor in condition.blocks]


def test_names_and_shapes_are_those_of_diffusers() -> None:
    published = FramePackConfig()
    with torch.device("meta"):
        reference = HunyuanVideoFramepackTransformer3DModel(
            has_image_proj=True, has_clean_x_embedder=True, image_proj_dim=1152
        )
    want = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    got = {name: tensor.shape for name, tensor in FramePackModel(published, device="meta").state_dict().items()}
    count = sum(shape.numel() for shape in got.values())
    print(f"{len(got)} tensors, {count:,} parameters")
    assert got == want
    assert (len(got), count) == (1274, 12_874_314_816)
    assert list(FramePackModel(TINY, device="meta").ordered_blocks()) == [
        "transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1",
    ]  # fmt: skip
