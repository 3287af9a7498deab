"""The demo's captions and clips: deterministic, complete, and drawn as the words say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.benchmarks.demo.captions import COLOURS, DIRECTIONS, SHAPES, Caption, all_captions, phrasings
from lowvram_video.benchmarks.demo.dataset import UNIT_AREAS, ClipSize, draw_scenes, render_clips, signed_distance

SIZE = ClipSize(num_frames=5, height=96, width=96)


def render(captions: list[Caption], seed: int = 0, size: ClipSize = SIZE) -> torch.Tensor:
    return render_clips(draw_scenes(captions, torch.Generator().manual_seed(seed)), size)


def test_there_are_enough_captions_and_each_parses_back():
    captions = all_captions()
    assert len(COLOURS) >= 5 and len(SHAPES) >= 3 and len(DIRECTIONS) >= 4
    assert len({caption.text for caption in captions}) == len(captions) == 648
    for caption in captions:
        for phrase in phrasings(caption):
            assert Caption.parse(phrase) == caption
            assert Caption.parse(phrase.upper()) == caption


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "colour"),
        ("a ball moves left", "colour"),
        ("a red elephant moves left", "shape"),
        ("a red ball", "direction"),
        ("a red blue ball moves left", "2 of them"),
        ("a reddish ball moves left", "colour"),
    ],
)
def test_parse_says_what_is_missing(text: str, names: str):
    with pytest.raises(ValueError, match=names):
        Caption.parse(text)


def test_unknown_word_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'mauve'.*'red', 'yellow'"):
        Caption("mauve", "ball", "left")


def test_the_same_seed_draws_the_same_clip_and_another_seed_another():
    captions = [Caption("red", "ball", "left"), Caption("blue", "triangle", "up", "quickly", "at night")]
    assert torch.equal(render(captions, seed=3), render(captions, seed=3))
    assert not torch.equal(render(captions, seed=3), render(captions, seed=4))


def test_clips_are_channel_first_and_within_range():
    clips = render([Caption("green", "square", "down")], size=ClipSize(9, 64, 64))
    assert clips.shape == (1, 3, 9, 64, 64) and clips.dtype == torch.float32
    assert clips.min() >= 0 and clips.max() <= 1


@given(index=st.integers(0, 647), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_object_never_leaves_the_frame(index: int, seed: int):
    caption = all_captions()[index]
    clip = render([caption], seed)[0]
    chroma = clip.amax(0) - clip.amin(0)  # [T, H, W]
    border = torch.cat((chroma[:, 0], chroma[:, -1], chroma[:, :, 0], chroma[:, :, -1]), dim=1)
    assert border.max() < 0.1
    assert (chroma.flatten(1).amax(1) > 0.5).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_signed_distance_encloses_the_stated_area_about_its_centroid(shape: str):
    grid = (torch.arange(2000) + 0.5) / 2000 * 4 - 2
    inside = signed_distance(shape, grid[None, :], grid[:, None], 1.0) < 0
    area = inside.float().mean().item() * 16
    centroid_y = (inside.float().sum(1) @ grid / inside.sum()).item()
    print(f"{shape}: area {area:.4f}, closed form {UNIT_AREAS[shape]:.4f}, centroid y {centroid_y:.1e}")
    assert math.isclose(area, UNIT_AREAS[shape], rel_tol=2e-3)
    assert abs(centroid_y) < 2e-3
