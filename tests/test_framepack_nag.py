"""Negative guidance on FramePack against its formula, written over diffusers' blocks in plain fp32 PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.attention.sage import workspace_on
from lowvram_video.framepack.footprint import SectionSize
from lowvram_video.framepack.network.model import FramePackModel, Prompt, StepNag
from lowvram_video.framepack.run.generation import section_size
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.nag import NagSettings
from torch import Tensor, nn

from .test_framepack_generation import SAMPLING, changed, material, prompt, run
from .test_framepack_model import GUIDANCE, TINY, Inputs, ours_of, reference_of, relative, run_reference, tiny_inputs
from .test_nag import published
from .tiny_framepack import CONFIG, save_framepack

SETTINGS = NagSettings(7.0, 1.5, 0.4)
TIMESTEP = 437.5


class Guided:
    """The blocks of diffusers' model with a negative prompt's text beside the prompt's.

    The video's rows have one stream, which the prompt modulates; each prompt's text has its own.
    """

    def __init__(self, reference: nn.Module, inputs: Inputs, negative: Prompt):
        self.reference, self.settings = reference, SETTINGS
        timestep, guidance = torch.tensor([TIMESTEP]), torch.tensor([GUIDANCE])
        mask = torch.ones(1, negative.text.shape[1])
        self.time, _ = reference.time_text_embed(timestep, negative.pooled, guidance)
        text = reference.context_embedder(negative.text, timestep, mask)
        self.text = torch.cat([reference.image_projection(inputs.image), text], dim=1)

    def double(self, block: Any, video: Tensor, text: Tensor, time: Tensor, _: None, rope: Any) -> Any:
        normed, *of_video = block.norm1(video, emb=time)
        attended, seen = {}, {}
        for name, own, its_time in (("positive", text, time), ("negative", self.text, self.time)):
            its_normed, gate, *rest = block.norm1_context(own, emb=its_time)
            with unprojected(block.attn):
                attended[name], context = block.attn(normed, its_normed, image_rotary_emb=rope)
            own = own + gate[:, None] * block.attn.to_add_out(context)
            seen[name] = self.added(own, block.norm2_context, block.ff_context, *rest)
        gate, *rest = of_video
        guided = published(attended["positive"], attended["negative"], self.settings)
        video = video + gate[:, None] * block.attn.to_out[0](guided)
        self.text = seen["negative"]
        return self.added(video, block.norm2, block.ff, *rest), seen["positive"]

    def single(self, block: Any, video: Tensor, text: Tensor, time: Tensor, _: None, rope: Any) -> Any:
        count = video.shape[1]
        attended, texts = {}, {}
        for name, own, its_time in (("positive", text, time), ("negative", self.text, self.time)):
            normed_video, video_gate = block.norm(video, emb=time)
            normed, gate = block.norm(own, emb=its_time)
            attended[name], context = block.attn(normed_video, normed, image_rotary_emb=rope)
            texts[name] = own + gate[:, None] * self.joined(block, normed, context)
        guided = published(attended["positive"], attended["negative"], self.settings)
        video = video + video_gate[:, None] * self.joined(block, normed_video, guided)
        assert video.shape[1] == count
        self.text = texts["negative"]
        return video, texts["positive"]

    def added(self, x: Tensor, norm: Any, layers: Any, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gate[:, None] * layers(norm(x) * (1 + scale[:, None]) + shift[:, None])

    def joined(self, block: Any, normed: Tensor, attended: Tensor) -> Tensor:
        return block.proj_out(torch.cat([attended, block.act_mlp(block.proj_mlp(normed))], dim=2))

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        reference = self.reference
        kinds = ((reference.transformer_blocks, self.double), (reference.single_transformer_blocks, self.single))
        for blocks, forward in kinds:
            for block in blocks:
                block.forward = lambda *given, block=block, forward=forward: forward(block, *given)
        try:
            yield
        finally:
            for blocks, _ in kinds:
                for block in blocks:
                    del block.forward


@contextmanager
def unprojected(attention: Any) -> Iterator[None]:
    """Attention without its output projections."""
    out, add_out = attention.to_out, attention.to_add_out
    attention.to_out, attention.to_add_out = nn.ModuleList([nn.Identity(), nn.Identity()]), nn.Identity()
    try:
        yield
    finally:
        attention.to_out, attention.to_add_out = out, add_out


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, FramePackModel, Inputs]:
    reference = reference_of(TINY, spread=0.1)
    return reference, ours_of(TINY, reference), tiny_inputs(reference.generator)


def negative_of(num_tokens: int) -> Prompt:
    generator = torch.Generator().manual_seed(5)
    return Prompt(*(torch.randn(shape, generator=generator) for shape in ((1, num_tokens, 24), (1, 12))))


def run_guided(model: FramePackModel, inputs: Inputs, negative: Prompt, settings: NagSettings = SETTINGS) -> Tensor:
    times = torch.tensor([TIMESTEP])
    (condition,), (opposed,) = (model.conditions(p, times, GUIDANCE) for p in (inputs.prompt(), negative))
    condition = replace(condition, nag=StepNag(opposed, settings))
    return model(inputs.noisy, inputs.history(), condition, model.embed_image(inputs.image))


@pytest.mark.parametrize("execution", [{}, {"token_chunk": 7}, {"token_chunk": 16, "head_groups": 2}], ids=str)
@pytest.mark.parametrize("num_tokens", [2, 6, 40], ids="{} tokens".format)
def test_a_pass_is_that_of_the_formula(
    tiny: tuple[nn.Module, FramePackModel, Inputs], num_tokens: int, execution: dict[str, int]
) -> None:
    reference, model, inputs = tiny
    negative = negative_of(num_tokens)
    plain = run_reference(reference, inputs, TIMESTEP)
    with Guided(reference, inputs, negative).in_blocks():
        want = run_reference(reference, inputs, TIMESTEP)
    model.execution = Execution(**execution)
    error, effect = relative(run_guided(model, inputs, negative), want), relative(want, plain)
    print(f"max relative error {error:.2e}, effect {effect:.2e}")
    assert error < 1e-5 and effect > 1e-2


def test_the_same_prompt_leads_nowhere(tiny: tuple[nn.Module, FramePackModel, Inputs]) -> None:
    _, model, inputs = tiny
    model.execution = Execution()
    (condition,) = model.conditions(inputs.prompt(), torch.tensor([TIMESTEP]), GUIDANCE)
    plain = model(inputs.noisy, inputs.history(), condition, model.embed_image(inputs.image))
    assert relative(run_guided(model, inputs, inputs.prompt()), plain) < 1e-5


@pytest.mark.parametrize("index", [0, -1], ids=["double", "single"])
def test_blocks_compile_into_one_graph(tiny: tuple[nn.Module, FramePackModel, Inputs], index: int) -> None:
    reference, _, inputs = tiny
    model, negative = ours_of(TINY, reference), negative_of(9)
    model.execution = Execution(token_chunk=64)
    want = run_guided(model, inputs, negative)
    list(model.ordered_blocks().values())[index].compile(backend="aot_eager", fullgraph=True)
    assert relative(run_guided(model, inputs, negative), want) < 2e-6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_framepack(tmp_path_factory.mktemp("framepack") / "framepack.safetensors")


def test_every_section_hears_it_and_only_the_prompts_passes(checkpoint: Path) -> None:
    guided, opposed = replace(SAMPLING, nag=SETTINGS), material(negative=prompt(40, 3))
    assert all(changed(run(checkpoint, given=opposed), run(checkpoint, guided, opposed)))
    own = replace(opposed, negative=None, nag=prompt(40, 3))
    assert not any(changed(run(checkpoint, guided, own), run(checkpoint, guided, opposed)))
    # at cfg 0 only the unconditional pass counts
    unconditional = replace(SAMPLING, cfg=0.0)
    with_nag = replace(unconditional, nag=SETTINGS)
    assert not any(changed(run(checkpoint, unconditional, opposed), run(checkpoint, with_nag, opposed)))


def test_it_needs_a_negative_prompt_and_settings_of_use() -> None:
    with pytest.raises(ValueError, match="NAG needs a negative prompt"):
        material().sections(replace(SAMPLING, nag=SETTINGS))
    with pytest.raises(ValueError, match="nag_scale"):
        material(negative=prompt(40)).sections(replace(SAMPLING, nag=NagSettings(-1.0)))


def test_runs_are_told_apart_by_it_and_older_ones_are_still_known() -> None:
    plain = material(negative=prompt(40))
    assert "nag" not in SAMPLING.identity() and "nag" not in plain.identity()
    assert replace(SAMPLING, nag=SETTINGS).identity() != replace(SAMPLING, nag=NagSettings()).identity()
    assert replace(plain, nag=prompt(41)).identity()["nag"] is not None


def test_the_plan_counts_the_other_prompt(checkpoint: Path) -> None:
    model = StreamedFramePack(checkpoint, RunSettings())
    without, guided = (section_size(replace(SAMPLING, nag=nag), (60, 104), end_image=False) for nag in (None, SETTINGS))
    assert isinstance(guided, SectionSize) and guided.tokens - without.tokens == guided.context_tokens
    # attention takes most: what the plan says of other sections is held against dry passes (test_planned_sections.py)
    limits = replace(limits_for(torch.device("cpu")), fused=True, attention=workspace_on(1 << 18))
    plans = [model.make_plan(work, limits) for work in (without, guided)]
    own = guided.rows * CONFIG.dim * model.model.execution.dtype.itemsize
    assert plans[1].denoise.activations - plans[0].denoise.activations > own
