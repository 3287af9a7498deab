"""Which latents every section sees, where they lie in time, and what part of the video it makes: index arithmetic.

A FramePack video of S sections with a window of w latents has S * w + 1 latents, the start image first, and
4 * S * w + 1 frames; without a start image it has S * w latents and 4 * S * w - 3 frames. `base` generates the
sections from the last to the first, `f1` from the first to the last.
Source: lllyasviel/FramePack `demo_gradio.py` and `demo_gradio_f1.py`; the end image in every section is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

SectionMode = Literal["base", "f1"]

FRAMES_PER_LATENT = 4
SPATIAL_STRIDE = 8  # pixels per latent
FRAMES_PER_SECOND = 30
MAX_WINDOW = 33
MAX_SECONDS = 86_400
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
class Section:
    """One run of the sampling loop; see `plan_sections`.

    `latents` and `seconds` are what it makes of the finished video, (from, to) with `to` excluded. The start image is
    in the seconds of the section that is the first of the video, unless that extends a given one; of the latents it is
    none. `to_decode` are latents of the history as it is afterwards, at the end that grew: those of the section, and
    those whose frames it is faded into.
    """

    number: int  # in order of generation, from 0
    num_sections: int
    indices: TimeIndices
    sources: Sources | None  # None: no history (one-frame mode)
    prepend: bool  # the new latents go before the history (base), otherwise behind it
    prepend_start: bool  # the start latent goes before the new ones first (base, last generated)
    latents: tuple[int, int]
    seconds: tuple[float, float]
    to_decode: slice

    @property
    def end_is_one(self) -> bool:
        """Whether the end image takes the place of the 1x latent (base, first generated)."""
        return self.indices.end is not None and self.indices.end in self.indices.one


def plan_sections(
    seconds: float,
    window: int = 9,
    mode: SectionMode = "base",
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
    count = count_sections(seconds, window)
    if mode == "base":
        return tuple(_base_section(number, count, window, start_image, end_image) for number in range(count))
    num_first = given_latents or int(start_image)
    return tuple(
        _f1_section(number, count, window, end_image, num_first, bool(given_latents)) for number in range(count)
    )


def plan_one_frame(target_index: int = 1) -> tuple[Section, ...]:
    """Return the only section of one-frame mode: one noisy latent at `target_index`, the start latent as all it sees.

    The larger the index, the more time has passed since the start image. Raises ValueError for an index below 1.
    """
    if target_index < 1:
        raise ValueError(f"target_index is {target_index}; expected 1 or more, because the start image has index 0.")
    indices = TimeIndices(noisy=(target_index,), start=0, one=(), two=(), four=(), end=None)
    return (Section(0, 1, indices, None, False, False, (0, 1), (0.0, 1 / FRAMES_PER_SECOND), slice(-1, None)),)


def count_sections(seconds: float, window: int = 9) -> int:
    """Return how many sections make about that many seconds: the nearest count (a half goes to even), at least 1.

    Raises ValueError naming what is out of range.
    """
    if not 0.0 < seconds <= MAX_SECONDS:
        raise ValueError(
            f"The video length is {seconds:g} s; expected a number of seconds above 0, such as 5, and at most a day's "
            f"{MAX_SECONDS}."
        )
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(
            f"latent_window_size is {window}; expected 1 to {MAX_WINDOW} latents of 4 frames (9 is what FramePack was "
            "trained with)."
        )
    return max(round(seconds * FRAMES_PER_SECOND / (FRAMES_PER_LATENT * window)), 1)


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


def _base_section(number: int, count: int, window: int, start_image: bool, end_image: bool) -> Section:
    padding = base_paddings(count)[number] * window
    start, _, noisy, one, two, four = _consecutive(1, padding, window, NUM_ONE, NUM_TWO, NUM_FOUR)
    # `number` sections have been made behind this one, and the end image lies behind them.
    end = _end_index("base", noisy, number * window) if end_image else None
    with_start = start_image and number == count - 1
    num_latents = window * (1 if number == 0 else 2) + with_start
    begin = start_image + (count - 1 - number) * window
    return Section(
        number=number,
        num_sections=count,
        indices=TimeIndices(noisy, start[0], one, two, four, end),
        sources=Sources(slice(0, 1), slice(1, 3), slice(3, NUM_HISTORY)),
        prepend=True,
        prepend_start=with_start,
        latents=(begin, begin + window),
        seconds=_seconds(begin, window, with_start),
        to_decode=slice(0, num_latents),
    )


def _f1_section(number: int, count: int, window: int, end_image: bool, num_first: int, extends: bool) -> Section:
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
        latents=(num_before, num_before + window),
        seconds=_seconds(num_before, window, with_start=number == 0 and num_first > 0 and not extends),
        to_decode=slice(-num_latents, None),
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


def _seconds(begin: int, window: int, with_start: bool) -> tuple[float, float]:
    """From when to when a section's latents, from `begin` on, play, and the start image where it belongs to them."""
    first_frame = 0 if with_start or begin == 0 else num_frames(begin)
    return first_frame / FRAMES_PER_SECOND, num_frames(begin + window) / FRAMES_PER_SECOND
