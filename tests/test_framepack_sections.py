"""FramePack's sections against the loops of its two demos, its noise, and its buckets."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.framepack.buckets import BUCKETS, nearest_bucket
from lowvram_video.framepack.sections import (
    Section,
    base_paddings,
    count_sections,
    plan_one_frame,
    plan_sections,
    section_noise,
)

ALL_LENGTHS = (*range(1, 121), 0.1, 1.5, 2.4, 4.8, 7.25, 119.5)
WINDOWS = range(1, 34)
# every length at the usual window, and every window at these
LENGTHS = (*range(1, 16), 0.1, 2.4, 7.25, 30, 60, 90, 119.5, 120)
START = 0  # labels of latents: their place in the finished video; "zero" for an empty history
ZEROS = ["zero"] * 19


def reference_base(seconds: float, w: int) -> list[dict]:
    """The loop of the base demo, on labels instead of latents: section by section what is split and decoded."""
    total = int(max(round((seconds * 30) / (w * 4)), 1))
    paddings = list(reversed(range(total)))
    if total > 4:
        paddings = [3] + [2] * (total - 3) + [1, 0]
    history: list = list(ZEROS)
    made, film = 0, 0
    out = []
    for turn, padding in enumerate(paddings):
        lengths = [1, padding * w, w, 1, 2, 16]
        pre, _, noisy, post, two, four = torch.arange(sum(lengths)).split(lengths)
        sources = history[:1], history[1:3], history[3:19]
        place = total - 1 - turn
        new = list(range(1 + place * w, 1 + (place + 1) * w))
        if padding == 0:
            new = [START, *new]
        history = [*new, *history]
        made += len(new)
        if turn == 0:
            decoded, overlap = history[:made], 0
        else:
            decoded, overlap = history[: 2 * w + 1 if padding == 0 else 2 * w], 4 * w - 3
        frames = 4 * len(decoded) - 3
        film += frames - overlap
        row = {"start": pre, "noisy": noisy, "one": post, "two": two, "four": four, "sources": sources, "new": new}
        out.append({**row, "decoded": decoded, "overlap": overlap, "history": list(history), "film": film})
    return out


def reference_f1(seconds: float, w: int, given: int = 0) -> list[dict]:
    """The loop of the F1 demo, on labels; `given` latents in place of the start latent extend a video."""
    total = int(max(round((seconds * 30) / (w * 4)), 1))
    history: list = [*ZEROS, *range(given or 1)]
    made, film = given or 1, 4 * given - 3 if given else 0
    out = []
    for turn in range(total):
        lengths = [1, 16, 2, 1, w]
        pre, four, two, one, noisy = torch.arange(sum(lengths)).split(lengths)
        s4, s2, s1 = history[-19:-3], history[-3:-1], history[-1:]
        new = list(range(made, made + w))
        history = [*history, *new]
        made += w
        if turn == 0 and not given:
            decoded, overlap = history[-made:], 0
        else:
            known = min(made - w, w)  # 2w latents, or all there are of a shorter given video
            decoded, overlap = history[-(known + w) :], 4 * known - 3
        film += 4 * len(decoded) - 3 - overlap
        row = {"start": pre, "noisy": noisy, "one": one, "two": two, "four": four, "sources": (s1, s2, s4), "new": new}
        out.append({**row, "decoded": decoded, "overlap": overlap, "history": list(history), "film": film})
    return out


def check_section(section: Section, expected: dict, history: list) -> list:
    """Compare one section with its reference; `history` holds labels before it. Returns the history after it."""
    indices, sources = section.indices, section.sources
    assert list(indices.noisy) == expected["noisy"].tolist()
    assert [indices.start] == expected["start"].tolist()
    for name in ("one", "two", "four"):
        assert list(getattr(indices, name)) == expected[name].tolist()
    assert (history[sources.one], history[sources.two], history[sources.four]) == expected["sources"]
    new = list(range(*section.latents))
    if section.prepend_start:
        new = [START, *new]
    assert new == expected["new"]
    history = [*new, *history] if section.prepend else [*history, *new]
    assert history == expected["history"]
    assert history[section.to_decode] == expected["decoded"]
    return history


def frames_of(section: Section) -> tuple[int, int]:
    """Of the finished video, at 30 frames a second."""
    first, end = (round(30 * second) for second in section.seconds)
    return first, end


@pytest.mark.parametrize("mode", ["base", "f1"])
def test_sections_follow_the_demos(mode: str) -> None:
    checked = 0
    for window in WINDOWS:
        for seconds in ALL_LENGTHS if window == 9 else LENGTHS:
            reference = reference_base(seconds, window) if mode == "base" else reference_f1(seconds, window)
            plan = plan_sections(seconds, window, mode)
            assert len(plan) == len(reference)
            history = [*ZEROS] if mode == "base" else [*ZEROS, START]
            for section, expected in zip(plan, reference, strict=True):
                history = check_section(section, expected, history)
                checked += 1
            assert reference[-1]["film"] == 4 * window * len(plan) + 1
            assert [latent for latent in history if latent != "zero"] == list(range(window * len(plan) + 1))
    print(f"{mode}: {checked} sections equal the demo's")


@pytest.mark.parametrize("window", [1, 5, 9, 33])
@pytest.mark.parametrize("given_latents", [1, 3, 9, 18, 40])
def test_extending_a_video(window: int, given_latents: int) -> None:
    plan = plan_sections(5, window, "f1", given_latents=given_latents)
    reference = reference_f1(5, window, given_latents)
    history = [*ZEROS, *range(given_latents)]
    film = 4 * given_latents - 3
    for section, expected in zip(plan, reference, strict=True):
        assert expected["overlap"] <= film
        history = check_section(section, expected, history)
        first, end = frames_of(section)
        assert first == film
        film += 4 * len(expected["decoded"]) - 3 - expected["overlap"]
        assert end == film
    assert plan[0].latents[0] == given_latents


def test_number_of_sections() -> None:
    for seconds in ALL_LENGTHS:
        for window in WINDOWS:
            assert count_sections(seconds, window) == int(max(round(seconds * 30 / (window * 4)), 1))


def test_the_real_window_by_hand() -> None:
    """Five seconds at the usual window: four sections of 9 latents, 145 frames."""
    plan = plan_sections(5)
    assert [section.indices.noisy[0] for section in plan] == [28, 19, 10, 1]
    assert [section.to_decode for section in plan] == [slice(0, 9), slice(0, 18), slice(0, 18), slice(0, 19)]
    assert [frames_of(section) for section in plan] == [(109, 145), (73, 109), (37, 73), (0, 37)]
    assert plan[-1].latents == (1, 10)
    assert plan[-1].seconds == (0.0, pytest.approx(37 / 30))
    assert [section.prepend_start for section in plan] == [False, False, False, True]
    assert plan[0].indices.clean == (0, 37)
    assert plan_sections(5, mode="f1")[2].indices.noisy == tuple(range(20, 29))
    assert base_paddings(7) == (3, 2, 2, 2, 2, 1, 0)
    assert [count_sections(seconds) for seconds in (0.1, 1.8, 3.0, 5, 120)] == [1, 2, 2, 4, 100]  # 1.5 -> 2, 2.5 -> 2


plans = st.builds(
    lambda seconds, window, mode, end, given: (
        plan_sections(seconds, window, mode, end_image=end, given_latents=given if mode == "f1" else 0),
        window,
        mode,
        end,
        given if mode == "f1" else 0,
    ),
    st.floats(0.01, 40.0),
    st.integers(1, 33),
    st.sampled_from(["base", "f1"]),
    st.booleans(),
    st.one_of(st.just(0), st.integers(1, 60)),
)


@settings(deadline=None, max_examples=150)
@given(plans)
def test_plans_cover_the_video_once(case) -> None:
    plan, window, mode, end, given_latents = case
    total = (given_latents or 1) + window * len(plan)
    ordered = sorted(plan, key=lambda section: section.seconds)
    assert list(ordered) == (list(plan) if mode == "f1" else list(reversed(plan)))
    for kind in ("latents", "seconds"):
        spans = [getattr(section, kind) for section in ordered]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
        assert all(begin < to for begin, to in spans)
    assert ordered[0].latents[0] == (given_latents or 1)
    assert ordered[-1].latents[1] == total
    assert frames_of(ordered[0])[0] == (4 * given_latents - 3 if given_latents else 0)
    assert frames_of(ordered[-1])[1] == 4 * (total - 1) + 1
    assert [section.number for section in plan] == list(range(len(plan)))
    assert [section.num_sections for section in plan] == [len(plan)] * len(plan)
    for section in plan:
        i = section.indices
        groups = [(i.start,), i.noisy, i.one, i.two, i.four]
        places = [place for group in groups for place in group]
        assert len(set(places)) == len(places) == 20 + window
        assert all(list(group) == list(range(group[0], group[0] + len(group))) for group in groups)
        if mode == "base":  # start, noisy, 1x, 2x, 4x in time
            assert i.start < i.noisy[0] < i.one[0] < i.two[0] < i.four[0]
            assert max(places) == i.noisy[0] + window + 18
        else:  # start, 4x, 2x, 1x, noisy in time, without a gap
            assert places[:1] == [0] and sorted(places) == list(range(20 + window))
            assert i.four[0] < i.two[0] < i.one[0] < i.noisy[0]
        assert (i.end is not None) == end
        assert i.clean[:2] == (i.start, i.one[0])
        assert len(i.clean) == (3 if end and not section.end_is_one else 2)


@pytest.mark.parametrize("window", [1, 4, 9, 19, 33])
@pytest.mark.parametrize("seconds", [0.5, 2, 5, 20])
def test_the_end_image_in_every_section(seconds: float, window: int) -> None:
    base = plan_sections(seconds, window, "base", end_image=True)
    for turn, section in enumerate(base):
        first = section.indices.noisy[0]
        assert section.indices.end == min(first + window + turn * window, first + window + 19)
        assert section.end_is_one == (turn == 0)
        assert section.indices.end <= section.indices.four[-1] + 1
    if len(base) <= 4:  # paddings are the true distances then, and the end has one place in all sections
        uncapped = [section for turn, section in enumerate(base) if turn * window <= 19]
        assert {section.indices.end for section in uncapped} == {window * len(base) + 1}
    f1 = plan_sections(seconds, window, "f1", end_image=True)
    for turn, section in enumerate(f1):
        behind = section.indices.noisy[-1] + 1
        assert section.indices.end == min(behind + (len(f1) - 1 - turn) * window, behind + 18)
        assert not section.end_is_one
        assert section.indices.clean == (0, 19, section.indices.end)
    without = plan_sections(seconds, window, "base")
    for with_end, plain in zip(base, without, strict=True):  # it changes one clean latent and nothing else
        assert replace(with_end, indices=plain.indices) == plain
        assert with_end.indices.noisy == plain.indices.noisy


def test_one_frame_mode() -> None:
    (section,) = plan_one_frame(9)
    assert section.indices.noisy == (9,)
    assert section.indices.clean == (0,)
    assert (section.indices.one, section.indices.two, section.indices.four) == ((), (), ())
    assert section.sources is None
    assert (section.number, section.num_sections) == (0, 1) and not section.end_is_one
    assert frames_of(section) == (0, 1)
    assert plan_one_frame()[0].indices.noisy == (1,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_sections(0), "video length is 0 s; expected a number of seconds above 0"),
        (lambda: plan_sections(float("nan")), "video length is nan s"),
        (lambda: plan_sections(float("inf")), "video length is inf s"),
        (lambda: plan_sections(5, 0), "latent_window_size is 0; expected 1 to 33"),
        (lambda: plan_sections(5, 34), "latent_window_size is 34; expected 1 to 33"),
        (lambda: plan_sections(5, 9, "f2"), "mode is 'f2'; expected one of base, f1"),
        (lambda: plan_sections(5, given_latents=3), "given_latents is 3 in mode 'base'"),
        (lambda: plan_one_frame(0), "target_index is 0; expected 1 or more"),
        (lambda: nearest_bucket(0, 5), "picture is 0x5 pixels"),
        (lambda: nearest_bucket(5, 5, 8), "base_resolution is 8"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_of_two_sections() -> None:
    generator = torch.Generator("cpu").manual_seed(31337)
    shape = (1, 16, 9, 608 // 8, 640 // 8)
    for expected in ([1.183282, -0.063059, 0.990851, -0.506069], [-0.261532, -0.494962, -2.321638, -1.975900]):
        noise = section_noise(generator, shape)
        assert (noise.shape, noise.dtype, noise.device.type) == (shape, torch.float32, "cpu")
        error = float((noise.flatten()[:4] - torch.tensor(expected)).abs().max())
        print(f"noise: largest difference {error:.1e}")
        assert error < 1e-6


def reference_bucket(h: int, w: int) -> tuple[int, int]:
    best, metric = None, float("inf")
    for bucket_h, bucket_w in BUCKETS:
        if abs(h * bucket_w - w * bucket_h) <= metric:
            best, metric = (bucket_w, bucket_h), abs(h * bucket_w - w * bucket_h)
    return best


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_buckets_are_framepacks(width: int, height: int) -> None:
    assert nearest_bucket(width, height) == reference_bucket(height, width)
    other = nearest_bucket(width, height, 480)
    known_sides = reference_bucket(height, width)
    assert all(side % 16 == 0 for side in other)
    assert all(abs(side - known * 480 / 640) <= 8 for side, known in zip(other, known_sides, strict=True))


def test_buckets_by_hand() -> None:
    assert nearest_bucket(1920, 1080) == (832, 480)
    assert nearest_bucket(1080, 1920) == (480, 832)
    assert nearest_bucket(500, 500) == (608, 640)
    assert nearest_bucket(1920, 1080, 512) == (672, 384)
    assert nearest_bucket(10_000, 1) == (960, 416)
    assert sorted(BUCKETS) == sorted((w, h) for h, w in BUCKETS)
    assert all(h * w <= 640 * 640 * 1.02 and h % 32 == 0 and w % 32 == 0 for h, w in BUCKETS)
