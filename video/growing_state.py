"""What the folder of a film holds, as its film.json says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..system.bounded_json import read_json_object

PART_NAME = re.compile(r"(final|open)_[0-9a-f-]+\.(mp4|safetensors)")
MAX_BYTES = 1 << 24
MAX_COUNT = 10**8  # frames, sections, pixels of a side
FORMAT = 2  # of the files: a film of another is built anew


@dataclass(frozen=True)
class VideoPart:
    """A file of frames: encoded ones, or in `VideoState.pixels` the frames as they are."""

    file: str
    num_frames: int
    sha256: str


@dataclass(frozen=True)
class VideoState:
    """What film.json says: the settings, the parts in play order, and which of it all the video shows.

    `num_open` frames at the growing edge may still change. They are in no part: `pixels` holds them where the film
    was left in order; else they come again with the last section. `shown_open` is how the video shows those of then.
    """

    format: int
    fps: float
    crf: int
    grows: str
    made_by: str = ""
    num_sections: int = 0
    height: int = 0
    width: int = 0
    parts: tuple[VideoPart, ...] = ()
    num_open: int = 0
    pixels: VideoPart | None = None
    num_shown_parts: int = 0
    shown_open: VideoPart | None = None
    film_sha256: str = ""  # of the whole video
    placed_sha256: str = ""  # of an earlier one that is in its place, where a player kept that from being replaced

    @property
    def settings(self) -> tuple[int, float, int, str, str]:
        """What two films must share for one to go on with the other's files."""
        return self.format, self.fps, self.crf, self.grows, self.made_by

    @property
    def num_frames(self) -> int:
        return sum(part.num_frames for part in self.parts) + self.num_open

    def ordered(self, finals: Sequence[VideoPart], edge: VideoPart | None) -> tuple[VideoPart, ...]:
        """Parts with the growing edge where it plays."""
        edges = [] if edge is None else [edge]
        return (*edges, *finals) if self.grows == "front" else (*finals, *edges)

    @property
    def named(self) -> tuple[VideoPart, ...]:
        """All files of the folder that belong to the film."""
        return (*self.parts, *(part for part in (self.pixels, self.shown_open) if part is not None))

    @property
    def shown(self) -> tuple[VideoPart, ...]:
        """The parts of the video, in play order."""
        first = len(self.parts) - self.num_shown_parts if self.grows == "front" else 0
        return self.ordered(self.parts[first : first + self.num_shown_parts], self.shown_open)


def read_state(path: Path) -> VideoState:
    """The state that a file holds; OSError, ValueError, KeyError or TypeError for any other file.

    It may have been edited: files are of this folder alone, by names that films give, and counts are counts.
    """
    stored = read_json_object(path, MAX_BYTES)
    single = {name: None if stored[name] is None else VideoPart(**stored[name]) for name in ("pixels", "shown_open")}
    state = VideoState(**{**stored, **single, "parts": tuple(VideoPart(**part) for part in stored["parts"])})
    _check(state)
    return state


def _check(state: VideoState) -> None:
    for part in state.named:
        if not isinstance(part.file, str) or not PART_NAME.fullmatch(part.file):
            raise ValueError(f"{part.file!r} is no file of a film")
        if not _is_count(part.num_frames) or not part.num_frames:
            raise ValueError(f"{part.file} has {part.num_frames!r} frames")
    counts = ("num_sections", "height", "width", "num_open", "num_shown_parts")
    if bad := [name for name in counts if not _is_count(getattr(state, name))]:
        raise ValueError(f"{bad[0]} is {getattr(state, bad[0])!r}")
    if state.num_shown_parts > len(state.parts) or (state.num_sections and not state.num_frames):
        raise ValueError("its counts do not agree")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT
