"""Which latents every section sees, where they lie in time, and what part of the video it makes: index arithmetic.

A FramePack video of S sections with a window of w latents has S * w + 1 latents, the start image first, and
4 * S * w + 1 frames; without a start image it has S * w latents and 4 * S * w - 3 frames. `base` generates the
sections from the last to the first, `f1` from the first to the last.
Source: lllyasviel/FramePack `demo_gradio.py` and `demo_gradio_f1.py`; the end image in every section is our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

SectionMode = Literal["base", "f1"]

FRAMES_PER_LATENT = 4
SPATIAL_STRIDE = 8  # pixels per latent
FRAMES_PER_SECOND = 30
MAX_WINDOW = 33
NUM_ONE, NUM_TWO, NUM_FOUR = 1, 2, 16  # latents of the history at 1x, 2x and 4x
# A history begins with so many zero latents; for f1 the start latent, or those of a given video, follow.
NUM_HISTORY = NUM_ONE + NUM_TWO + NUM_FOUR
# An end image lies at most so far behind the first index after the noisy ones. Base: right behind the 4x latents.
END_REACH = {"base": NUM_HISTORY, "f1": NUM_HISTORY - 1}


@dataclass(frozen=True)
class TimeIndices:
    """Places on the time axis of the rotary embedding. Scales that a section does not have are empty."""

    noisy: tuple[int, ...]
    start: int
    one: tuple[int, ...]
    two: tuple[int, ...]
    four: tuple[int, ...]
    end: int | None  # of the end image; equal to one[0] where it takes the place of the 1x latent

    @property
    def clean(self) -> tuple[int, ...]:
        """Places of the clean latents: start, 1x, and the end image unless it is the 1x."""
        apart = self.end is not None and self.end not in self.one
        return (self.start, *self.one, *((self.end,) if apart and self.end is not None else ()))


@dataclass(frozen=True)
class Sources:
    """Which latents of the history (its time axis, as it is before the section) are the 1x, 2x and 4x ones."""

    one: slice
    two: slice
    four: slice


@dataclass(frozen=True)
class Span:
    """What a section makes of the finished video, each (from, to) with `to` excluded.

    `latents` and `frames` hold the start image where the section is the first of the video, except behind a given
    video; `noisy` is `latents` without it (for video-to-video: the source's latents to begin with).
    """

    latents: tuple[int, int]
    noisy: tuple[int, int]
    frames: tuple[int, int]
    seconds: tuple[float, float]

    def later(self, seconds: float) -> Span:
        """The same behind so much of the video that none of the latents hold."""
        begin, end = self.seconds
        return replace(self, seconds=(begin + seconds, end + seconds))


@dataclass(frozen=True)
class Decoding:
    """What is decoded after a section: so many latents of the grown history, at the end that grew.

    `num_frames` is what they decode to. `overlap_frames` of it blend linearly into the film there is already: the last
    ones where sections are prepended, else the first. 0 where there is no film yet.
    """

    latents: slice
    num_latents: int
    num_frames: int
    overlap_frames: int


@dataclass(frozen=True)
class Section:
    """One run of the sampling loop; see `plan_sections`."""

    number: int  # in order of generation, from 0
    num_sections: int
    indices: TimeIndices
    sources: Sources | None  # None: no history (one-frame mode)
    prepend: bool  # the new latents go before the history (base), otherwise behind it
    prepend_start: bool  # the start latent goes before the new ones first (base, last generated)
    span: Span
    decoding: Decoding

    @property
    def end_is_one(self) -> bool:
        """Whether the end image takes the place of the 1x latent (base, first generated)."""
        return self.indices.end is not None and self.indices.end in self.indices.one


def plan_sections(
    seconds: float,
    window: int = 9,
    mode: SectionMode = "base",
    fps: float = FRAMES_PER_SECOND,
    *,
    start_image: bool = True,
    end_image: bool = False,
    given_latents: int = 0,
) -> tuple[Section, ...]:
    """Return the sections of a video in order of generation.

    `window` is in latents. Without a `start_image` its place is shown to every section all the same, but belongs to no
    part of the video. `end_image` gives every section a place for one more clean latent: behind what is between
    the section and the end, but not beyond the reach of the history. `given_latents` (f1 only) extends a video of so
    many latents by `seconds`; the history then begins with 19 zeros and those latents, and the film with its frames.
    Raises ValueError naming what is out of range.
    """
    if mode not in get_args(SectionMode):
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(get_args(SectionMode))}.")
    if given_latents < 0 or (given_latents and mode != "f1"):
        raise ValueError(
            f"given_latents is {given_latents} in mode {mode!r}; expected 0, or with mode 'f1' the number of latents "
            "of the video to extend. Base generates backwards from the end and cannot continue a video."
        )
    count = count_sections(seconds, window, fps)
    if mode == "base":
        return tuple(_base_section(number, count, window, fps, start_image, end_image) for number in range(count))
    num_first = given_latents or int(start_image)
    return tuple(
        _f1_section(number, count, window, fps, end_image, num_first, bool(given_latents)) for number in range(count)
    )


def plan_one_frame(target_index: int = 1, fps: float = FRAMES_PER_SECOND) -> tuple[Section, ...]:
    """Return the only section of one-frame mode: one noisy latent at `target_index`, the start latent as all it sees.

    The larger the index, the more time has passed since the start image. Raises ValueError for an index below 1.
    """
    if target_index < 1:
        raise ValueError(f"target_index is {target_index}; expected 1 or more, because the start image has index 0.")
    span = Span(latents=(0, 1), noisy=(0, 1), frames=(0, 1), seconds=(0.0, 1 / fps))
    indices = TimeIndices(noisy=(target_index,), start=0, one=(), two=(), four=(), end=None)
    decoding = Decoding(latents=slice(-1, None), num_latents=1, num_frames=1, overlap_frames=0)
    return (Section(0, 1, indices, None, prepend=False, prepend_start=False, span=span, decoding=decoding),)


def count_sections(seconds: float, window: int = 9, fps: float = FRAMES_PER_SECOND) -> int:
    """Return how many sections make about that many seconds: the nearest count (a half goes to even), at least 1.

    Raises ValueError naming what is out of range.
    """
    if not (math.isfinite(seconds) and seconds > 0.0):
        raise ValueError(f"The video length is {seconds} s; expected a number of seconds above 0, such as 5.")
    if not (math.isfinite(fps) and fps > 0.0):
        raise ValueError(f"fps is {fps}; expected a number of frames per second above 0 (FramePack makes 30).")
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(
            f"latent_window_size is {window}; expected 1 to {MAX_WINDOW} latents of 4 frames (9 is what FramePack was "
            "trained with)."
        )
    return max(round(seconds * fps / (FRAMES_PER_LATENT * window)), 1)


def base_paddings(num_sections: int) -> tuple[int, ...]:
    """Return how many windows lie between the start and each section as the model is told, in order of generation.

    Beyond 4 sections the middle ones all say 2, which FramePack found to look better than the truth.
    """
    if num_sections > 4:
        return (3, *[2] * (num_sections - 3), 1, 0)
    return tuple(reversed(range(num_sections)))


def num_frames(num_latents: int) -> int:
    """Return how many frames so many latents decode to: 1 for the first, 4 for each other."""
    return FRAMES_PER_LATENT * (num_latents - 1) + 1


def section_noise(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Return the noise of the next section, float32 [1, 16, window, height / 8, width / 8] on the CPU.

    All sections of a run draw from one CPU generator in order of generation: the same video on every machine.
    Raises ValueError for a generator of another device.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"The generator is on {generator.device}; pass torch.Generator('cpu').manual_seed(seed).")
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def _base_section(number: int, count: int, window: int, fps: float, start_image: bool, end_image: bool) -> Section:
    padding = base_paddings(count)[number] * window
    start, _, noisy, one, two, four = _consecutive(1, padding, window, NUM_ONE, NUM_TWO, NUM_FOUR)
    # `number` sections have been made behind this one, and the end image lies behind them.
    end = _end_index("base", noisy, number * window) if end_image else None
    with_start = start_image and number == count - 1
    num_latents = window * (1 if number == 0 else 2) + with_start
    return Section(
        number=number,
        num_sections=count,
        indices=TimeIndices(noisy, start[0], one, two, four, end),
        sources=Sources(slice(0, 1), slice(1, 3), slice(3, NUM_HISTORY)),
        prepend=True,
        prepend_start=with_start,
        span=_span(start_image + (count - 1 - number) * window, window, fps, with_start=with_start),
        decoding=Decoding(
            latents=slice(0, num_latents),
            num_latents=num_latents,
            num_frames=num_frames(num_latents),
            overlap_frames=num_frames(window) if number else 0,
        ),
    )


def _f1_section(
    number: int, count: int, window: int, fps: float, end_image: bool, num_first: int, extends: bool
) -> Section:
    """`num_first` latents are before the first section: the start image, or those of a video that it extends."""
    start, four, two, one, noisy = _consecutive(1, NUM_FOUR, NUM_TWO, NUM_ONE, window)
    end = _end_index("f1", noisy, (count - 1 - number) * window) if end_image else None
    num_before = num_first + number * window
    # The first section has no film before it but that of a given video.
    overlap = min(num_before, window) if number or extends else 0
    num_latents = (overlap or num_first) + window
    return Section(
        number=number,
        num_sections=count,
        indices=TimeIndices(noisy, start[0], one, two, four, end),
        sources=Sources(slice(-1, None), slice(-3, -1), slice(-NUM_HISTORY, -3)),
        prepend=False,
        prepend_start=False,
        span=_span(num_before, window, fps, with_start=number == 0 and num_first > 0 and not extends),
        decoding=Decoding(
            latents=slice(-num_latents, None),
            num_latents=num_latents,
            num_frames=num_frames(num_latents),
            overlap_frames=num_frames(overlap) if overlap else 0,
        ),
    )


def _consecutive(*lengths: int) -> list[tuple[int, ...]]:
    """Split 0, 1, 2, ... into runs of these lengths."""
    runs, begin = [], 0
    for length in lengths:
        runs.append(tuple(range(begin, begin + length)))
        begin += length
    return runs


def _end_index(mode: SectionMode, noisy: tuple[int, ...], distance: int) -> int:
    """Place of the end image, `distance` latents behind the noisy ones or as far as that mode reaches."""
    return noisy[-1] + 1 + min(distance, END_REACH[mode])


def _span(begin: int, window: int, fps: float, with_start: bool) -> Span:
    """Span of the noisy latents from `begin` on, and of the start latent where it belongs to the section."""
    end = begin + window
    first_frame = 0 if with_start or begin == 0 else num_frames(begin)
    frames = (first_frame, num_frames(end))
    return Span(
        latents=(begin - with_start, end),
        noisy=(begin, end),
        frames=frames,
        seconds=(frames[0] / fps, frames[1] / fps),
    )
