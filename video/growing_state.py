"""What the folder of a film holds, as its film.json says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """The state that a file holds; OSError, ValueError, KeyError or TypeError for any other file."""
    stored: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    single = {name: stored[name] and VideoPart(**stored[name]) for name in ("pixels", "shown_open")}
    return VideoState(**{**stored, **single, "parts": tuple(VideoPart(**part) for part in stored["parts"])})
