"""FramePack's sections guided through ComfyUI: what changes nothing changes nothing, masks keep, batches are videos."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_pack.framepack.timed_prompts import parse_timed_prompt
from lowvram_pack.nodes.bridge.framepack_conditioning import NAME_KEY, TIMED_KEY
from lowvram_pack.nodes.framepack_inputs import FramePackEndImage
from lowvram_pack.nodes.nag import NegativeGuidance
from test_framepack import CONFIG, SIZE, folders, model, randn, run, said  # noqa: F401 - fixtures
from tiny_models import relative_error
from torch import Tensor

SHORT = {"total_second_length": 0.3, "steps": 3}
GUIDED = SHORT | {"cfg": 3.0, "negative": said(20)}
EXACT = 1e-4


def changed(model: Any, change: Any) -> Any:  # noqa: F811
    clone = model.clone()
    change(clone)
    return clone


@pytest.mark.parametrize("settings", [SHORT, GUIDED, GUIDED | {"cfg_rescale": 0.7}, GUIDED | {"use_teacache": True}])
def test_a_node_that_changes_nothing_changes_nothing(model: Any, settings: dict[str, Any]) -> None:  # noqa: F811
    nothing = changed(model, lambda clone: clone.set_model_sampler_post_cfg_function(lambda given: given["denoised"]))
    assert relative_error(run(nothing, **settings), run(model, **settings)) < EXACT


def test_a_guidance_function_is_of_what_is_denoised(model: Any) -> None:  # noqa: F811
    def same(given: dict[str, Any]) -> Tensor:  # of x - denoised, as core has it
        return given["uncond"] + given["cond_scale"] * (given["cond"] - given["uncond"])

    def twice(given: dict[str, Any]) -> Tensor:
        return given["uncond"] + 2 * given["cond_scale"] * (given["cond"] - given["uncond"])

    plain = run(model, **GUIDED)
    assert (
        relative_error(run(changed(model, lambda m: m.set_model_sampler_cfg_function(same)), **GUIDED), plain) < EXACT
    )
    got = run(changed(model, lambda m: m.set_model_sampler_cfg_function(twice)), **GUIDED)
    assert relative_error(got, run(model, **(GUIDED | {"cfg": 6.0}))) < EXACT


def test_a_shift_of_a_node_is_that_of_the_widget(model: Any) -> None:  # noqa: F811
    from other_nodes import known, patched

    shifted = patched(known()["ModelSamplingSD3"], model, {"shift": 9.0})
    with_shift = run(model, **SHORT, shift=9.0)
    for _ in range(2):  # also where the patch is in its place from the run before
        assert relative_error(run(shifted, **SHORT), with_shift) < EXACT
    assert relative_error(run(shifted, **SHORT), run(model, **SHORT)) > EXACT
    with pytest.raises(ValueError, match="a shift of 9"):
        run(shifted, **SHORT, shift=3.0)


def test_ranges_and_guidance_of_a_prompt(model: Any) -> None:  # noqa: F811
    whole = [[text, {**options, "start_percent": 0.0, "end_percent": 1.0}] for text, options in said(10)]
    assert relative_error(run(model, **SHORT, positive=whole), run(model, **SHORT)) < EXACT
    first = [[text, {**options, "start_percent": 0.0, "end_percent": 0.3}] for text, options in said(10)]
    then = [[text, {**options, "start_percent": 0.3, "end_percent": 1.0}] for text, options in said(30)]
    both = run(model, **SHORT, positive=first + then)
    assert all(relative_error(both, run(model, **SHORT, positive=said(seed))) > EXACT for seed in (10, 30))
    own = [[text, {**options, "guidance": 3.0}] for text, options in said(10)]
    assert torch.equal(run(model, **SHORT, positive=own), run(model, **SHORT, guidance_scale=3.0))
    for options in ({"guidance": None}, {"area": (1, 2, 0, 0)}, {"control": object()}, {"unheard": 1}):
        with pytest.raises(ValueError, match="FramePack"):
            run(model, **SHORT, positive=[[text, {**old, **options}] for text, old in said(10)])


@pytest.mark.parametrize(
    "ranges, said_to_be",
    [([(0.0, 0.3)], "30%"), ([(0.2, 1.0)], "0%"), ([(0.0, 0.5), (0.6, 1.0)], "50%"), ([(0.5, 0.9), (0.0, 0.6)], "90%")],
)
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_steps_without_a_prompt_are_refused(
    model: Any,  # noqa: F811
    side: str,
    ranges: list[tuple[float, float]],
    said_to_be: str,
) -> None:
    entries = [
        [text, {**options, "start_percent": start, "end_percent": end}]
        for start, end in ranges
        for text, options in said(10)
    ]
    with pytest.raises(ValueError, match=f"no {side} prompt is heard from {said_to_be} of the steps on.*FramePack"):
        run(model, **(GUIDED | {side: entries}))
    heard = [[text, {**options, "default": True}] for text, options in said(10)]  # where no other is
    assert run(model, **(GUIDED | {side: entries + heard})).isfinite().all()


def test_a_noise_mask_keeps_the_given_video(model: Any) -> None:  # noqa: F811
    video = randn(1, 16, 4, *SIZE, seed=5)
    settings = SHORT | {"denoise_strength": 0.7, "latent_window_size": 3}

    def made(mask: Tensor | None) -> Tensor:
        given = {"samples": video} | ({} if mask is None else {"noise_mask": mask})
        return run(model, **settings, initial_samples=given, start_latent=None)

    height, width = (8 * side for side in SIZE)
    assert relative_error(made(torch.ones(1, height, width)), made(None)) < EXACT
    kept = made(torch.zeros(1, height, width))
    torch.testing.assert_close(kept[:, :, 1:4], video[:, :, 1:4], rtol=1e-4, atol=1e-4)
    half = torch.ones(1, height, width)
    half[:, :, : width // 2] = 0
    got = made(half)
    torch.testing.assert_close(
        got[:, :, 1:4, :, : SIZE[1] // 2], video[:, :, 1:4, :, : SIZE[1] // 2], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="noise mask"):
        run(model, **SHORT, start_latent={"samples": video[:, :, :1], "noise_mask": half})


def test_a_batch_of_start_latents_is_as_many_videos(model: Any) -> None:  # noqa: F811
    starts = randn(2, 16, 1, *SIZE, seed=8)
    both = run(model, **SHORT, start_latent={"samples": starts})
    assert both.shape[0] == 2
    for place in range(2):
        one = run(model, **SHORT, start_latent={"samples": starts[place : place + 1]}, seed=3 + place)
        assert torch.equal(both[place : place + 1], one)
    second = {"samples": starts[1:], "batch_index": [1]}
    assert torch.equal(run(model, **SHORT, start_latent=second), both[1:])
    with pytest.raises(ValueError, match="a batch of 2, and another"):
        run(
            model,
            **SHORT,
            start_latent={"samples": starts},
            initial_samples={"samples": randn(3, 16, 4, *SIZE, seed=1)},
        )


def test_runs_of_other_nodes_are_not_taken_for_each_other(model: Any) -> None:  # noqa: F811
    def scaled(factor: float) -> Any:
        return changed(model, lambda m: m.set_model_sampler_post_cfg_function(lambda given: given["denoised"] * factor))

    one, other = (run(scaled(factor), **SHORT, resume=True) for factor in (1.0, 0.9))
    assert not torch.equal(one, other)
    assert torch.equal(run(scaled(1.0), **SHORT, resume=True), one)


def negated(model: Any, scale: float = 7.0, alpha: float = 0.4) -> Any:  # noqa: F811
    return NegativeGuidance.execute(model, said(40, 12), scale, 1.5, alpha).result[0]


def test_negative_guidance_off_is_the_same_to_the_last_bit(model: Any) -> None:  # noqa: F811
    plain = run(model, **SHORT)
    for off in (negated(model, scale=1.0), negated(model, alpha=0.0)):
        assert torch.equal(run(off, **SHORT), plain)


def test_negative_guidance_is_the_same_through_comfyuis_guider(model: Any) -> None:  # noqa: F811
    guided = negated(model)
    nothing = changed(guided, lambda clone: clone.set_model_sampler_post_cfg_function(lambda given: given["denoised"]))
    for settings in (SHORT, GUIDED, SHORT | {"use_teacache": True}):
        own = run(guided, **settings)
        assert relative_error(own, run(model, **settings)) > 1e-3
        assert relative_error(run(nothing, **settings), own) < EXACT


def test_negative_guidance_leaves_the_negative_prompts_passes_alone(model: Any) -> None:  # noqa: F811
    unconditional = GUIDED | {"cfg": 0.0}  # only those passes count
    assert torch.equal(run(negated(model), **unconditional), run(model, **unconditional))


def test_negative_guidance_wants_a_prompt_of_framepacks(model: Any) -> None:  # noqa: F811
    text = NegativeGuidance.execute(model, [[said(40)[0][0], {}]], 7.0, 1.5, 0.4).result[0]
    with pytest.raises(ValueError, match="a prompt has no pooled output"):
        run(text, **SHORT)


def test_a_batch_of_end_images_is_as_many_videos(model: Any) -> None:  # noqa: F811
    ends, features = randn(2, 16, 1, *SIZE, seed=9), randn(2, 5, CONFIG.image_dim, seed=11)

    def end(part: slice) -> Any:
        shown = SimpleNamespace(last_hidden_state=features[part])
        return FramePackEndImage.execute("linear", 1.0, {"samples": ends[part]}, shown).result[0]

    both = run(model, **SHORT, end_image=end(slice(None)))
    for place in range(2):
        one = run(model, **SHORT, end_image=end(slice(place, place + 1)), seed=3 + place)
        assert torch.equal(both[place : place + 1], one)


@pytest.mark.parametrize("name", ["start", "end"])
def test_a_video_in_the_place_of_a_picture_is_refused(model: Any, name: str) -> None:  # noqa: F811
    video = {"samples": randn(1, 16, 3, *SIZE, seed=5)}
    given = {"start_latent": video}
    if name == "end":
        given = {"end_image": FramePackEndImage.execute("linear", 1.0, video).result[0]}
    with pytest.raises(ValueError, match=f"the {name} latent is a video of 3 latents, and FramePack takes one picture"):
        run(model, **SHORT, **given)


def test_a_noise_mask_on_an_end_image_is_refused(model: Any) -> None:  # noqa: F811
    masked = {"samples": randn(1, 16, 1, *SIZE, seed=5), "noise_mask": torch.ones(1, 32, 48)}
    with pytest.raises(ValueError, match="the end latent has a noise mask, which FramePack Sampler"):
        run(model, **SHORT, end_image=FramePackEndImage.execute("linear", 1.0, masked).result[0])


def test_a_schedule_of_negative_prompts_is_refused(model: Any) -> None:  # noqa: F811
    timed = parse_timed_prompt("[0s: dark] [0.2s: blurred]")
    schedule = [[said(seed)[0][0], {**said(seed)[0][1], TIMED_KEY: timed, NAME_KEY: name}]
                for seed, name in ((20, "dark"), (22, "blurred"))]  # fmt: skip
    with pytest.raises(ValueError, match="the negative one has 2 prompts of it"):
        run(model, **(GUIDED | {"negative": schedule}))
