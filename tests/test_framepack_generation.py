"""Whole runs on tiny weights: against a plain loop over diffusers' transformer, streamed, resumed, changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from lowvram_video.framepack.network.model import Frames, History, Prompt, StepCondition
from lowvram_video.framepack.request import SAMPLERS, EncodedInputs, Sampling
from lowvram_video.framepack.run.folder import RunStore
from lowvram_video.framepack.run.generation import Generation, MadeSection, OnStep, noise_levels, prepare, section_size
from lowvram_video.framepack.sections import SectionMode
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.framepack.timed_prompts import parse_timed_prompt
from lowvram_video.memory.plan.footprint import GIB
from lowvram_video.memory.plan.host_memory import RAM_MARGIN_BYTES
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.sampling.samplers import select_sampler
from lowvram_video.sampling.schedules import framepack_shift, framepack_sigmas
from lowvram_video.weights.lora.file import LoraChoice
from safetensors.torch import save_file
from torch import Tensor

from .tiny_framepack import CONFIG, make_tensors, save_framepack

CPU = torch.device("cpu")
SIZE = (4, 6)  # of the latents
WINDOW, STEPS = 3, 4
SECONDS = 3 * 4 * WINDOW / 30  # three sections
SAMPLING = Sampling(seconds=SECONDS, window=WINDOW, num_steps=STEPS, seed=7, cache_threshold=None)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, length: int = 7) -> Prompt:
    return Prompt(randn(1, length, CONFIG.text_dim, seed=seed), randn(1, CONFIG.pooled_dim, seed=seed + 1))


def material(**changes: object) -> EncodedInputs:
    text = "she stands"
    plain = EncodedInputs(
        latent_size=SIZE,
        timed=parse_timed_prompt(text),
        prompts={text: prompt(20)},
        start=randn(1, 16, 1, *SIZE, seed=1),
        start_features=randn(1, 5, CONFIG.image_dim, seed=2),
    )
    return replace(plain, **changes)


END = {"end": randn(1, 16, 1, *SIZE, seed=3), "end_features": randn(1, 5, CONFIG.image_dim, seed=4)}


def run(
    path: Path,
    sampling: Sampling = SAMPLING,
    given: EncodedInputs | None = None,
    settings: RunSettings | None = None,
    store: RunStore | None = None,
    loras: tuple[LoraChoice, ...] = (),
    stop: Callable[[MadeSection], None] | None = None,
    on_step: OnStep | None = None,
) -> list[MadeSection]:
    """A run from the file to its latents."""
    given, settings = given or material(), settings or RunSettings()
    model = StreamedFramePack(path, settings, loras=loras)
    sections = given.sections(sampling)
    plan = model.make_plan(
        section_size(sampling, given.latent_size, given.end is not None),
        limits_for(CPU, ram_budget_gib=settings.ram_budget_gib),
    )
    made = []
    with torch.inference_mode():
        conditions = prepare(model, plan, sampling, given, sections)
        model.start(plan)
        try:
            for section in Generation(model, sampling, given, sections, conditions, CPU, store, on_step).run():
                made.append(section)
                if stop is not None:
                    stop(section)
        finally:
            model.release()
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_framepack(tmp_path_factory.mktemp("framepack") / "framepack.safetensors")


@pytest.fixture(scope="module")
def reference() -> HunyuanVideoFramepackTransformer3DModel:
    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.head_dim,
        num_layers=CONFIG.num_layers, num_single_layers=CONFIG.num_single_layers,
        num_refiner_layers=CONFIG.num_refiner_layers, mlp_ratio=CONFIG.mlp_ratio, patch_size=2, patch_size_t=1,
        qk_norm="rms_norm", guidance_embeds=True, text_embed_dim=CONFIG.text_dim,
        pooled_projection_dim=CONFIG.pooled_dim, rope_theta=256.0, rope_axes_dim=CONFIG.rope_axes,
        image_condition_type=None, has_image_proj=True, image_proj_dim=CONFIG.image_dim, has_clean_x_embedder=True,
    ).eval()  # fmt: skip
    model.load_state_dict(make_tensors())
    return model


def denoised(
    model: HunyuanVideoFramepackTransformer3DModel, shown: dict[str, Tensor], x: Tensor, sigma: Tensor
) -> Tensor:
    timestep = (sigma * 1000).bfloat16().float()[None]
    return x - sigma * model(x, timestep, **shown, return_dict=False)[0]


def plain_loop(model: HunyuanVideoFramepackTransformer3DModel, sampling: Sampling, given: EncodedInputs) -> Tensor:
    """The definition of the loop, for videos of 1 to 4 sections, written down without the package's indices."""
    w, count = sampling.window, round(sampling.seconds * 30 / (4 * sampling.window))
    forward = sampling.mode == "f1"
    said = next(iter(given.prompts.values()))
    generator = torch.Generator().manual_seed(sampling.seed)
    sigmas = framepack_sigmas(sampling.num_steps, framepack_shift(w * (SIZE[0] // 2) * (SIZE[1] // 2)))
    history = torch.zeros(1, 16, 19, *SIZE)
    if forward:
        history = torch.cat([history, given.start], dim=2)
    for number in range(count):
        place = number if forward else count - 1 - number  # in the video
        pad = 0 if forward else place * w
        if forward:
            start, four_at, two_at, one_at, noisy_at = torch.arange(1 + 16 + 2 + 1 + w).split([1, 16, 2, 1, w])
            four, two, one = history[:, :, -19:].split([16, 2, 1], dim=2)
        else:
            start, _, noisy_at, one_at, two_at, four_at = torch.arange(1 + pad + w + 19).split([1, pad, w, 1, 2, 16])
            one, two, four = history[:, :, :19].split([1, 2, 16], dim=2)
        clean, clean_at = [given.start, one], [start, one_at]
        if given.end is not None:
            behind = (count - 1 - number if forward else number) * w  # latents between this section and the end
            if behind == 0 and not forward:
                clean[1] = given.end
            else:
                clean.append(given.end)
                clean_at.append(noisy_at[-1:] + 1 + min(behind, 18 if forward else 19))
        features = given.start_features
        if given.end is not None:
            features = torch.lerp(given.start_features, given.end_features, place / (count - 1))
        noise = torch.randn(1, 16, w, *SIZE, generator=generator)
        shown = {
            "encoder_hidden_states": said.text,
            "encoder_attention_mask": torch.ones(1, said.text.shape[1]),
            "pooled_projections": said.pooled,
            "image_embeds": features,
            "indices_latents": noisy_at,
            "guidance": torch.tensor([sampling.guidance * 1000]),
            "latents_clean": torch.cat(clean, dim=2),
            "indices_latents_clean": torch.cat(clean_at),
            "latents_history_2x": two,
            "indices_latents_history_2x": two_at,
            "latents_history_4x": four,
            "indices_latents_history_4x": four_at,
        }
        new = select_sampler("unipc_bh1")(partial(denoised, model, shown), noise, sigmas)
        if not forward and place == 0:
            new = torch.cat([given.start, new], dim=2)
        history = torch.cat([history, new] if forward else [new, history], dim=2)
    return history[:, :, 19:] if forward else history[:, :, : count * w + 1]


@pytest.mark.parametrize("end", [False, True], ids=["", "end image"])
@pytest.mark.parametrize("mode", ["base", "f1"])
@torch.inference_mode()
def test_three_sections_equal_a_plain_loop(
    checkpoint: Path, reference: HunyuanVideoFramepackTransformer3DModel, mode: str, end: bool
) -> None:
    sampling = replace(SAMPLING, mode=mode)
    given = material(**(END if end else {}))
    video = run(checkpoint, sampling, given)[-1].video
    want = plain_loop(reference, sampling, given)
    error = float((video - want).abs().max() / want.std())
    print(f"{mode} {end}: three sections of diffusers' transformer, max error / std {error:.1e}")
    assert video.shape == want.shape == (1, 16, 3 * WINDOW + 1, *SIZE)
    assert error < 1e-4


def test_streamed_equals_resident_bit_for_bit(checkpoint: Path) -> None:
    resident = run(checkpoint)[-1].video
    little = (RAM_MARGIN_BYTES + 2**20) / GIB
    streamed = run(checkpoint, settings=RunSettings(ram_budget_gib=little))[-1].video
    assert torch.equal(resident, streamed)


class Stopped(Exception):
    """The run is interrupted."""


def test_an_interrupted_run_goes_on_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    want = run(checkpoint)
    identity = {"seed": SAMPLING.seed}

    def after_the_first(made: MadeSection) -> None:
        raise Stopped

    with pytest.raises(Stopped), RunStore.open(tmp_path, identity, 3) as store:
        run(checkpoint, store=store, stop=after_the_first)
    with RunStore.open(tmp_path, identity, 3) as store:
        assert store.completed == 1
        numbers: set[int] = set()
        got = run(checkpoint, store=store, on_step=lambda section, step: numbers.add(section.number))
    assert len(got) == 3 and numbers == {1, 2}, "the first is not made again"
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.video, theirs.video) and torch.equal(ours.to_decode, theirs.to_decode)


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from lowvram_video.framepack.run.folder import RunStore
from tests.test_framepack_generation import run

def die_in_the_second(section, step):
    if section.number == 1 and step.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)

with RunStore.open(Path(sys.argv[2]), {"seed": 7}, 3) as store:
    run(Path(sys.argv[1]), store=store, on_step=die_in_the_second)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_kill_9_in_the_second_section_and_again(checkpoint: Path, tmp_path: Path) -> None:
    want = run(checkpoint)[-1].video
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path)],
        check=False, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    with RunStore.open(tmp_path, {"seed": 7}, 3) as store:
        assert store.completed == 1, "the first section was kept"
        numbers: set[int] = set()
        got = run(checkpoint, store=store, on_step=lambda section, step: numbers.add(section.number))
    assert len(got) == 3 and numbers == {1, 2}, "the first is not made again"
    assert torch.equal(got[-1].video, want)


# --- what changes what -----------------------------------------------------------------------------------


def changed(one: list[MadeSection], other: list[MadeSection]) -> list[bool]:
    return [not torch.equal(a.latents, b.latents) for a, b in zip(one, other, strict=True)]


def test_a_timed_prompt_changes_its_section_and_those_made_after_it(checkpoint: Path) -> None:
    later = SECONDS * 0.7
    text = f"she stands [{later}s: she waves]"
    prompts = {"she stands": prompt(20), "she waves": prompt(30, 9)}
    timed = material(timed=parse_timed_prompt(text), prompts=prompts)
    forward = replace(SAMPLING, mode="f1")
    # the last third of the video: the last section forwards, the first one backwards
    assert changed(run(checkpoint, forward), run(checkpoint, forward, timed)) == [False, False, True]
    assert changed(run(checkpoint), run(checkpoint, given=timed)) == [True, True, True]
    same = material(timed=parse_timed_prompt(text), prompts={name: prompt(20) for name in prompts})
    assert changed(run(checkpoint), run(checkpoint, given=same)) == [False, False, False]


def test_a_cross_fade_lies_between_its_prompts(checkpoint: Path) -> None:
    prompts = {"a": prompt(20), "b": prompt(30)}
    forward = replace(SAMPLING, mode="f1", seconds=SECONDS / 3)

    def first(text: str, fade: float) -> Tensor:
        timed = parse_timed_prompt(text, fade)
        return run(checkpoint, forward, material(timed=timed, prompts=prompts))[0].latents

    only_a, only_b, both = first("a", 0), first("b", 0), first(f"a [{SECONDS / 6}s: b]", SECONDS)
    assert not torch.equal(both, only_a) and not torch.equal(both, only_b)
    apart = (only_a - only_b).norm()
    assert (both - only_a).norm() < apart and (both - only_b).norm() < apart


def test_a_section_outside_a_cross_fade_hears_its_prompt_as_ever(checkpoint: Path) -> None:
    prompts = {"a": prompt(20, 5), "b": prompt(30, 9)}
    forward = replace(SAMPLING, mode="f1")
    faded = parse_timed_prompt(f"a [{SECONDS / 2}s: b]", SECONDS / 6)
    plain = run(checkpoint, forward, material(timed=parse_timed_prompt("a"), prompts=prompts))
    mixed = run(checkpoint, forward, material(timed=faded, prompts=prompts))
    assert changed(plain, mixed) == [False, True, True]


def test_the_end_image_reaches_every_section(checkpoint: Path) -> None:
    for mode in ("base", "f1"):
        sampling = replace(SAMPLING, mode=mode)
        one = material(**END)
        other = material(end=randn(1, 16, 1, *SIZE, seed=9), end_features=END["end_features"])
        # sections that are made first would not see a change that only came through the history
        first_only = [run(checkpoint, sampling, each)[0] for each in (one, other)]
        assert not torch.equal(first_only[0].latents, first_only[1].latents), mode


def test_features_glide_from_the_start_to_the_end() -> None:
    given = material(**END)
    backwards = [given.features(section) for section in given.sections(SAMPLING)]
    forwards = [given.features(section) for section in given.sections(replace(SAMPLING, mode="f1"))]
    for features in (backwards[::-1], forwards):
        assert torch.equal(features[0], given.start_features) and torch.equal(features[2], given.end_features)
        assert torch.allclose(features[1], (given.start_features + given.end_features) / 2)
    weighted = replace(given, interpolation="weighted_average", start_strength=0.25)
    section = weighted.sections(SAMPLING)[0]
    assert torch.allclose(weighted.features(section), given.start_features * 0.25 + given.end_features * 0.75)
    assert torch.equal(replace(weighted, interpolation="disabled").features(section), given.start_features * 0.25)


def test_guidance_1_is_no_second_pass_and_more_is(checkpoint: Path) -> None:
    negative = material(negative=prompt(40, 3))
    assert changed(run(checkpoint), run(checkpoint, given=negative)) == [False, False, False]
    guided = replace(SAMPLING, cfg=2.0)
    assert all(changed(run(checkpoint), run(checkpoint, guided, negative)))
    same = material(negative=prompt(20))
    error = (run(checkpoint, guided, same)[0].latents - run(checkpoint)[0].latents).abs().max()
    assert error < 1e-4, "guidance away from the same prompt leads nowhere"


def test_a_pass_that_is_repeated_counts_once_for_the_cache(checkpoint: Path) -> None:
    """As after running out of memory in the layers behind the blocks."""
    sampling, given = replace(SAMPLING, cache_threshold=0.15, num_steps=8, seconds=SECONDS / 3), material()
    sections, model = given.sections(sampling), StreamedFramePack(checkpoint, RunSettings())
    plan = model.make_plan(section_size(sampling, given.latent_size, given.end is not None), limits_for(CPU))
    blocks_run: list[int] = []
    model.blocks[0].advance = lambda *args, run=model.blocks[0].advance: (blocks_run.append(1), run(*args))
    with torch.inference_mode():
        conditions = prepare(model, plan, sampling, given, sections)
        model.start(plan)

        def repeated(*arguments: Any) -> Tensor:
            model(*arguments)
            return model(*arguments)

        found, num_computed = [], []
        for velocity in (model, repeated):
            blocks_run.clear()
            found.append(next(iter(Generation(velocity, sampling, given, sections, conditions, CPU).run())).latents)
            num_computed.append(len(blocks_run))
    model.release()
    assert num_computed[0] < 8, "some are reused"
    assert num_computed[1] == 2 * num_computed[0]
    assert torch.equal(found[0], found[1])


def test_each_prompt_of_a_step_has_its_own_cache(checkpoint: Path) -> None:
    """With a shared one, cond would be compared with uncond and reuse what that added."""
    sampling = replace(SAMPLING, cfg=2.0, num_steps=8, seconds=SECONDS / 3)
    given = material(negative=prompt(40, 3))
    exact = run(checkpoint, sampling, given)[0].latents
    never = run(checkpoint, replace(sampling, cache_threshold=0.0), given)[0].latents
    assert torch.equal(exact, never)
    seen: dict[int, set[int]] = {}

    model = StreamedFramePack(checkpoint, RunSettings())
    sections = given.sections(sampling)
    plan = model.make_plan(section_size(sampling, given.latent_size, given.end is not None), limits_for(CPU))
    with torch.inference_mode():
        conditions = prepare(model, plan, sampling, given, sections)
        model.start(plan)

        def velocity(
            noisy: Frames, history: History, condition: StepCondition, image: Tensor | None, cache: object
        ) -> Tensor:
            seen.setdefault(id(cache), set()).add(condition.text.shape[0])
            return model(noisy, history, condition, image, cache)

        cached = replace(sampling, cache_threshold=0.15)
        list(Generation(velocity, cached, given, sections, conditions, CPU).run())
    model.release()
    assert sorted(map(sorted, seen.values())) == [[3], [7]]


def test_strength_0_keeps_the_given_video_and_1_ignores_it(checkpoint: Path) -> None:
    initial = randn(1, 16, 3 * WINDOW + 1, *SIZE, seed=50)
    given = material(initial=initial)
    kept = run(checkpoint, replace(SAMPLING, strength=0.0), given)[-1].video
    assert torch.equal(kept[:, :, 1:], initial[:, :, 1:]), "in the video's order, whatever the order of sections"
    assert torch.equal(kept[:, :, :1], given.start)
    assert changed(run(checkpoint), run(checkpoint, given=given)) == [False, False, False]
    half = run(checkpoint, replace(SAMPLING, strength=0.5), given)[-1].video
    assert half.isfinite().all() and not torch.equal(half, kept)


def test_a_video_is_extended_forwards(checkpoint: Path) -> None:
    video = randn(1, 16, 8, *SIZE, seed=60)
    sampling = replace(SAMPLING, mode="f1")
    made = run(checkpoint, sampling, material(start=None, given=video))
    assert torch.equal(made[-1].video[:, :, :8], video) and made[-1].video.shape[2] == 8 + 3 * WINDOW
    assert made[0].to_decode.shape[2] == 2 * WINDOW
    with pytest.raises(ValueError, match="F1 model"):
        material(given=video).sections(SAMPLING)


def test_one_frame_is_a_single_latent(checkpoint: Path) -> None:
    made = run(checkpoint, replace(SAMPLING, one_frame=3))
    assert len(made) == 1 and made[0].latents.shape[2] == 1
    assert made[0].latents.std() > 0.1
    for mode in ("base", "f1"):
        (picture,) = run(checkpoint, replace(SAMPLING, one_frame=3, mode=mode))
        assert torch.equal(picture.video, made[0].latents), "the picture alone, whatever the model's mode"
    other = run(checkpoint, replace(SAMPLING, one_frame=9))
    assert not torch.equal(made[0].latents, other[0].latents)


def test_one_frame_has_the_noise_levels_of_one_latent() -> None:
    levels = noise_levels(replace(SAMPLING, one_frame=3), (76, 80))
    assert torch.equal(levels, framepack_sigmas(STEPS, framepack_shift(76 * 80 // 4)))


@pytest.mark.parametrize("mode", ["base", "f1"])
def test_text_alone_makes_a_video_of_its_sections(checkpoint: Path, mode: SectionMode) -> None:
    """The place of the start image is shown, as nothing, but is no part of the video."""
    text = material(start=None, start_features=torch.zeros(1, 5, CONFIG.image_dim))
    made = run(checkpoint, replace(SAMPLING, mode=mode), text)
    shown = run(checkpoint, replace(SAMPLING, mode=mode), replace(text, start=torch.zeros(1, 16, 1, *SIZE)))
    assert made[-1].video.shape[2] == 3 * WINDOW
    assert torch.equal(made[-1].video, shown[-1].video[:, :, 1:])
    for section, other in zip(made, shown, strict=True):
        first = 1 if other.section.seconds[0] == 0 else 0
        assert torch.equal(section.to_decode, other.to_decode[:, :, first:])
        decoded = section.section.to_decode
        assert section.to_decode.shape[2] == (decoded.stop or -decoded.start)


def test_a_video_to_change_starts_at_its_own_first_latent(checkpoint: Path) -> None:
    video = randn(1, 16, 3 * WINDOW + 1, *SIZE, seed=50)
    half = replace(SAMPLING, strength=0.5)
    made = run(checkpoint, half, material(start=None, initial=video))
    named = run(checkpoint, half, material(start=video[:, :, :1], initial=video))
    assert torch.equal(made[-1].video, named[-1].video) and torch.equal(made[-1].video[:, :, :1], video[:, :, :1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_strength_of_0_keeps_the_video(checkpoint: Path, sampler: str) -> None:
    video = randn(1, 16, 3 * WINDOW + 1, *SIZE, seed=50)
    made = run(checkpoint, replace(SAMPLING, strength=0.0, sampler=sampler), material(initial=video, start=None))
    assert torch.equal(made[-1].video, video)


def test_a_lora_changes_what_its_strength_says(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {}
    for layer in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.norm.linear"):
        weight = make_tensors()[f"{layer}.weight"]
        tensors[f"transformer.{layer}.lora_A.weight"] = randn(4, weight.shape[1], seed=70)
        tensors[f"transformer.{layer}.lora_B.weight"] = randn(weight.shape[0], 4, seed=71) * 0.1
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    plain = run(checkpoint)
    assert not any(changed(plain, run(checkpoint, loras=(LoraChoice(path, 0.0),))))
    assert all(changed(plain, run(checkpoint, loras=(LoraChoice(path, 1.0),))))
    merged = run(checkpoint, loras=(LoraChoice(path, 1.0),), settings=RunSettings(lora_mode="merge"))
    beside = run(checkpoint, loras=(LoraChoice(path, 1.0),))
    error = (merged[-1].video - beside[-1].video).abs().max() / merged[-1].video.std()
    print(f"LoRA beside and merged: max difference / std {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize(
    ("sampling", "given", "words"),
    [
        (replace(SAMPLING, cfg=3.0), {}, "negative prompt"),
        (replace(SAMPLING, strength=0.5), {}, "initial_samples"),
        (replace(SAMPLING, num_steps=0), {}, "steps is 0"),
        (replace(SAMPLING, sampler="ddim"), {}, "sampler 'ddim'"),
        (replace(SAMPLING, cfg_rescale=2.0), {}, "cfg_rescale is 2.0"),
        (replace(SAMPLING, cache_threshold=-1.0), {}, "TeaCache threshold is -1.0"),
        (SAMPLING, {"latent_size": (5, 6)}, "48x40 cannot be made"),
        (replace(SAMPLING, seconds=-1.0), {}, "length"),
        (SAMPLING, {"end": torch.zeros(1, 16, 1, 8, 8)}, "the end latent"),
        (SAMPLING, {"interpolation": "cubic"}, "embed_interpolation"),
        (
            replace(SAMPLING, mode="f1"),
            {"initial": randn(1, 16, 8, *SIZE, seed=1), "given": randn(1, 16, 8, *SIZE, seed=2)},
            "connect one of them",
        ),
    ],
)
def test_requests_that_contradict_themselves_are_refused(
    sampling: Sampling, given: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        material(**given).sections(sampling)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts": {"she stands": Prompt(torch.zeros(1, 0, CONFIG.text_dim), prompt(1).pooled)}}, "has no tokens"),
        ({"prompts": {"she stands": Prompt(torch.zeros(1, 7, 8), prompt(1).pooled)}}, "text of width 8"),
        ({"negative": Prompt(prompt(1).text, torch.zeros(1, 3))}, "the negative prompt has .* pooled vector of 3"),
        ({"start_features": torch.zeros(1, 5, 8)}, "the start image's features have the width 8"),
        ({"end_features": torch.zeros(1, 6, CONFIG.image_dim)}, "features of 5 and 6 tokens"),
    ],
)
def test_encodings_of_other_models_are_refused(given: dict[str, object], words: str) -> None:
    material().check_for(CONFIG)
    with pytest.raises(ValueError, match=words):
        material(**given).check_for(CONFIG)
