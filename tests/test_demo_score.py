"""The judge of the demo model: right on drawn clips, also noisy and blurred ones, and hard to fool."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lowvram_video.benchmarks.demo.captions import COLOURS, DIRECTIONS, SHAPES, Caption, all_captions
from lowvram_video.benchmarks.demo.dataset import ClipSize, draw_scenes, render_clips
from lowvram_video.benchmarks.demo.score import FIELDS, judge, main, pick_captions, score, table
from lowvram_video.demo.files import DEMO_FILES
from lowvram_video.weights.files.open import open_checkpoint

from .quantizers import write_gguf

SIZE = ClipSize(num_frames=9, height=96, width=96)
CAPTION = Caption("red", "ball", "left", "slowly", "at night")


def render(captions: list[Caption], seed: int = 0, size: ClipSize = SIZE) -> torch.Tensor:
    """[N, T, H, W, 3]"""
    scenes = draw_scenes(captions, torch.Generator().manual_seed(seed))
    return render_clips(scenes, size).permute(0, 2, 3, 4, 1)


def degrade(clips: torch.Tensor, noise: float, blur: int) -> torch.Tensor:
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2).contiguous()  # as which they blur faster
    if blur > 1:
        frames = F.avg_pool2d(F.pad(frames, [blur // 2] * 4, mode="replicate"), blur, stride=1)
    frames = frames + noise * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return frames.clamp(0, 1).permute(0, 2, 3, 1).reshape(clips.shape)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[list[Caption], torch.Tensor]]:
    """108 clips of all kinds, in three lots."""
    captions = pick_captions(108, seed=5)
    lots = [(captions[start : start + 36], start) for start in range(0, len(captions), 36)]
    return [(lot, render(lot, seed=start)) for lot, start in lots]


@pytest.mark.parametrize(("noise", "blur"), [(0.0, 1), (0.08, 1), (0.0, 7), (0.04, 5)])
def test_judge_is_right_on_drawn_clips(drawn: list[tuple[list[Caption], torch.Tensor]], noise: float, blur: int):
    verdicts = [
        judge(clip, caption)
        for captions, clips in drawn
        for clip, caption in zip(degrade(clips, noise, blur), captions, strict=True)
    ]
    assert len(verdicts) == 108
    right = sum(verdict.all_right for verdict in verdicts)
    print(f"noise {noise}, blur {blur}: {right} of {len(verdicts)} right")
    assert right == len(verdicts)


@pytest.mark.parametrize("size", [ClipSize(17, 64, 64), ClipSize(5, 128, 128)])
def test_judge_does_not_depend_on_the_size(size: ClipSize):
    captions = pick_captions(24, seed=1)
    clips = render(captions, seed=2, size=size)
    assert all(judge(clip, caption).all_right for clip, caption in zip(clips, captions, strict=True))


@pytest.mark.parametrize(
    ("field", "others"),
    [
        ("colour", [name for name in COLOURS if name != CAPTION.colour]),
        ("shape", [name for name in SHAPES if name != CAPTION.shape]),
        ("direction", [name for name in DIRECTIONS if name != CAPTION.direction]),
        ("speed", ["", "quickly"]),
        ("place", ["", "in the snow"]),
    ],
)
def test_judge_rejects_one_wrong_attribute_and_only_that(field: str, others: list[str]):
    for other in others:
        shown = replace(CAPTION, **{field: other})
        verdict = judge(render([shown])[0], CAPTION)
        assert getattr(verdict, field) == other
        assert [name for name in FIELDS if not verdict.right(name)] == [field]
        assert not verdict.all_right


def test_an_unnamed_speed_and_place_are_not_judged():
    caption = Caption("green", "square", "up")
    for speed in ("slowly", "quickly"):
        assert judge(render([replace(caption, speed=speed, place="in the snow")])[0], caption).all_right


@pytest.mark.parametrize(
    "clip",
    [
        torch.full((9, 96, 96, 3), 0.5),
        torch.zeros(9, 96, 96, 3),
        torch.rand(9, 96, 96, 3, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["grey", "black", "noise"],
)
def test_a_clip_without_an_object_is_wrong(clip: torch.Tensor):
    assert not judge(clip, CAPTION).all_right


def test_a_still_clip_a_vanishing_object_and_two_objects_are_wrong():
    clip = render([CAPTION])[0]
    still = clip[:1].expand(9, -1, -1, -1)
    assert judge(still, CAPTION).direction is None
    vanishing = torch.cat((clip[:6], torch.zeros_like(clip[6:])))
    assert not judge(vanishing, CAPTION).all_right
    doubled = torch.maximum(clip, clip.roll(40, dims=1))
    assert judge(doubled, CAPTION).shape is None


def test_score_asks_for_each_caption_and_counts():
    asked: list[tuple[str, int]] = []

    def generate(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        asked.extend(zip(prompts, seeds, strict=True))
        wrong_first = ["a red ball moves up", *prompts[1:]]
        return render([Caption.parse(prompt) for prompt in wrong_first])

    captions = [Caption("blue", "square", "down"), *pick_captions(7, seed=3)]
    verdicts = score(generate, captions)
    assert [prompt for prompt, _ in asked] == [caption.text for caption in captions]
    assert len({seed for _, seed in asked}) == 8
    assert [verdict.all_right for verdict in verdicts] == [False] + [True] * 7
    text = table(verdicts)
    print(text)
    assert "87.5" in text and "a blue square moves down" in text


def test_picked_captions_are_fixed_by_the_seed_and_all_different():
    assert pick_captions(64) == pick_captions(64)
    assert len(set(pick_captions(648))) == len(all_captions())
    assert len(pick_captions(700)) == 700


@pytest.mark.parametrize("form", ["int8", "Q4_K"])
def test_a_quantised_demo_model_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
):
    options = ["--quantization", "int8"]
    if form == "Q4_K":
        checkpoint = open_checkpoint(DEMO_FILES.model)
        tensors = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
        packed = {name for name, values in tensors.items() if name.startswith("blocks.") and values.ndim == 2}
        kinds = {name: (values, "Q4_K" if name in packed else "F16") for name, values in tensors.items()}
        options = ["--model", str(write_gguf(tmp_path / "demo.gguf", kinds))]
    monkeypatch.setattr(sys, "argv", ["score", "--num", "1", *options])
    assert main() == 0
    shown = capsys.readouterr().out
    print(shown)
    assert "everything         1     1   100.0" in shown
