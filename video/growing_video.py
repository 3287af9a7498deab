"""A video that grows section by section, and plays at any moment."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..system.atomic_files import write_file
from ..system.output_lock import file_sha256
from ..system.regular_files import read_regular
from .growing_state import FORMAT, VideoPart, VideoState, read_state
from .pictures import to_uint8
from .placed_video import COMING, PlacedVideo
from .tags import Tags
from .writer import VideoWriter, check_rate, check_video, check_writable, flush_file, writing

logger = logging.getLogger(__name__)

Grows = Literal["front", "back"]

PIXEL_BYTES = 0.25  # of H.264 at crf 12 without B-frames, for pictures with noise of 10 in 255; most take far less
LEFTOVERS = ("final_", "open_", "film.json.", "tags.txt", "parts.txt")
MOST_HEADER_BYTES = 1 << 16  # of a file of open frames
SHOWN = 0.9  # of what is made, at least, plays: all publications but the last write 1 / (1 - SHOWN) films at most


class GrowingVideo:
    """A video at `path` that grows at the front (`grows="front"`, later sections play earlier) or at the back.

    The film is all of its frames, the video what a player finds of them at `path`. Neighbouring sections share frames
    and are cross-faded there. The frames at the growing edge wait for the next
    section, in memory; all others are encoded once, into parts that are copied together into the video. That is
    published, whole, when a tenth of it is new, at `publish` and at `finish`, and plays at any moment. What the
    process leaves in `folder`, however it ends, is taken up again: `num_sections` are there already, but for the last
    one where the process was killed, whose open frames are wanted once more. The folder is the film's alone.
    `crf` is x264's quality; `made_by` names what decodes the frames: a film of another is built anew. The video has
    `tags`, which the folder does not keep. Raises ValueError where `path` cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        path: str | Path,
        fps: float = 30,
        crf: int = 12,
        grows: Grows = "back",
        made_by: str = "",
        tags: Tags | None = None,
    ) -> None:
        if grows not in ("front", "back"):
            raise ValueError(f'grows is {grows!r}; a film grows at its "front" or at its "back"')
        check_rate(fps)
        self.folder, self.path, self.tags = folder, check_video(path), tags or {}
        check_writable(folder / "film.json")
        self._state = VideoState(FORMAT, float(fps), crf, grows, made_by)
        self._edge: Tensor | None = None  # uint8 [E, H, W, 3]
        self._placed = PlacedVideo(folder, self.path, self._state.fps, self.tags)
        self._resume()

    @property
    def video(self) -> Path:
        """Where all that is shown plays: `path`, or another name where that is open in a player on Windows."""
        return self._placed.current

    @property
    def num_sections(self) -> int:
        """How many sections are in the film; the next `add` is for the one after them."""
        return self._state.num_sections - self._lost_edge

    @property
    def num_frames(self) -> int:
        """How many frames the film has."""
        return self._state.num_frames

    @property
    def num_shown(self) -> int:
        """How many of them the video has."""
        return sum(part.num_frames for part in self._state.shown)

    def add(self, frames: Tensor, overlap: int) -> None:
        """The next section: `[T, H, W, 3]`, uint8 or floats in -1 ... 1, all sections of one size.

        `overlap` frames are shared with the film so far, and as many wait for the next section. They are faded
        linearly, as FramePack's `soft_append_bcthw` does. Raises ValueError for frames that do not fit and
        VideoError, with the film as it was, where something cannot be written.
        """
        frames = self._check(frames, overlap)
        if self._lost_edge:
            self._find_edge(frames)
            return
        if self._edge is not None:
            earlier, later = (frames, self._edge) if self._at_front else (self._edge, frames)
            frames = cross_fade(earlier, later, overlap)
        still_open = min(overlap, len(frames))
        sizes = [still_open, len(frames) - still_open]
        if self._at_front:
            edge, final = frames.split(sizes)
        else:
            final, edge = frames.split(sizes[::-1])
        self._grow(self._encode([final], f"final_{self._new_name()}"), edge)

    def begin(self, pieces: Iterable[Tensor], still_open: int) -> None:
        """What plays before all that is made, as the first section: uint8 `[T, H, W, 3]`, piece by piece.

        Only a piece and the last `still_open` frames, which wait for the next section, are held in memory. The film is
        empty and grows at its back. Raises as `add`.
        """
        assert not self.num_sections and not self._at_front
        edge: Tensor | None = None

        def final() -> Iterator[Tensor]:
            nonlocal edge
            for piece in pieces:
                frames = self._check(piece, 0)
                edge = frames if edge is None else torch.cat([edge, frames])
                num_done = max(0, len(edge) - still_open)
                yield edge[:num_done]
                edge = edge[num_done:].clone()

        part = None
        if self._lost_edge:
            deque(final(), maxlen=0)
        else:
            part = self._encode(final(), f"final_{self._new_name()}")
        if edge is None:
            raise ValueError(f"there are no frames to begin {self.path} with: give a video that has some")
        self._find_edge(edge) if self._lost_edge else self._grow(part, edge)

    def publish(self) -> None:
        """Have the video show all that was made: the film is left for a while. VideoError as `add`."""
        if self._lost_edge or (self.num_shown == self.num_frames and (self._edge is None or self._state.pixels)):
            self._settle()  # as it was found, or nothing new
            return
        state = self._shown(self._state, self._edge)
        if self._edge is not None:
            state = replace(state, pixels=self._keep(self._edge))
        self._commit(state)
        self._settle()

    def _keep(self, edge: Tensor) -> VideoPart:
        """The open frames as they are, on the disk."""
        pixels = self.folder / f"open_{self._new_name()}.safetensors"
        with writing(self.folder):
            write_file(pixels, save({"frames": edge}))
            return VideoPart(pixels.name, len(edge), file_sha256(pixels))

    def leave(self) -> None:
        """`publish` where the run failed or was interrupted, whose error is what counts: a second one is only told."""
        try:
            self.publish()
        except (OSError, ValueError) as error:  # the other where its folder cannot be written any more
            logger.warning("%s", error)

    def finish(self) -> None:
        """No section follows: the video shows all of them. VideoError as `add`."""
        if self._lost_edge or (self._edge is None and self.num_shown == self.num_frames):
            self._settle()
            return
        shown = self._shown(self._state, self._edge)
        parts = shown.ordered(shown.parts, shown.shown_open)
        closed = replace(shown, parts=parts, num_shown_parts=len(parts), num_open=0, shown_open=None, pixels=None)
        self._commit(closed)
        self._edge = None
        self._settle()

    def _settle(self) -> None:
        """Nothing more is shown for now: a video that found its place taken has it at last, or a name of its own."""
        if self._placed.settle():
            self._commit(replace(self._state, placed_sha256=""))

    @staticmethod
    def is_at(folder: Path, path: Path) -> bool:
        """Whether the file at `path` is the video that the film in `folder` wrote last, or was about to note."""
        if not path.is_file():
            return False
        found = file_sha256(path)
        with suppress(OSError, ValueError):
            if read_regular(folder / COMING, len(found)) == found.encode("ascii"):
                return True
        try:
            state = read_state(folder / "film.json")
            return found in (state.film_sha256, state.placed_sha256)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _new_name(self) -> str:
        """Never used before: nothing that the last film.json names is written over."""
        return f"{self.num_sections:04d}-{secrets.token_hex(4)}"

    @property
    def _lost_edge(self) -> bool:
        """Whether the open frames of the last section are not at hand: the process that had them was killed."""
        return self._state.num_open > 0 and self._edge is None

    def _find_edge(self, frames: Tensor) -> None:
        """Take the open frames from the last section, which comes once more."""
        count = self._state.num_open
        self._edge = (frames[:count] if self._at_front else frames[-count:]).clone()

    def _grow(self, final: VideoPart | None, edge: Tensor) -> None:
        """Take in a section's encoded frames and those that wait for the next."""
        before = self._state
        new = [] if final is None else [final]
        state = replace(
            before,
            num_sections=before.num_sections + 1,
            height=edge.shape[1],
            width=edge.shape[2],
            parts=tuple([*new, *before.parts] if self._at_front else [*before.parts, *new]),
            num_open=len(edge),
            pixels=None,
        )
        # The video first: after a crash in between it is one section ahead, and the same section comes again.
        if self.num_shown <= SHOWN * state.num_frames:
            state = self._shown(state, edge)
        self._commit(state)
        self._edge = edge.clone() if len(edge) else None

    @property
    def _at_front(self) -> bool:
        return self._state.grows == "front"

    def _check(self, frames: Tensor, overlap: int) -> Tensor:
        if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
            raise ValueError(f"a section's frames are {list(frames.shape)}; expected [T, H, W, 3]")
        size = self._state.height, self._state.width
        if self.num_sections and tuple(frames.shape[1:3]) != size:
            raise ValueError(
                f"a section has frames of {frames.shape[2]} x {frames.shape[1]} pixels, and the film in {self.folder} "
                f"has {size[1]} x {size[0]}: give frames of that size, or start another film"
            )
        edge = self._state.num_open
        if not self._lost_edge and (overlap < 0 or (self.num_sections and overlap > min(edge, len(frames)))):
            raise ValueError(
                f"section {self.num_sections} of {len(frames)} frames is to overlap the film by {overlap}; "
                f"0 to {min(edge, len(frames))} are possible, as the section before left {edge} open"
            )
        if self._edge is not None and overlap > 1 and len(frames) < 2 * overlap - 1:
            raise ValueError(
                f"section {self.num_sections} of {len(frames)} frames cannot be faded by {overlap} at both ends: give "
                f"{2 * overlap - 1} or more"
            )
        if frames.is_floating_point():
            return to_uint8(frames.permute(3, 0, 1, 2)[None])
        return frames.cpu()

    def _encode(self, pieces: Iterable[Tensor], name: str) -> VideoPart | None:
        """Frames as a part; None where there are none."""
        video = self.folder / f"{name}.mp4"
        with VideoWriter(video, self._state.fps, self._state.crf, is_part=True) as writer:
            for frames in pieces:
                if len(frames):
                    writer.write(frames)
        if not writer.num_frames:
            return None
        with writing(self.folder):
            return VideoPart(video.name, writer.num_frames, flush_file(video))

    def _shown(self, state: VideoState, edge: Tensor | None) -> VideoState:
        """The state with all of it published."""
        shows_all = self.num_shown == state.num_frames and state.num_shown_parts == len(state.parts)
        if shows_all and not self._placed.was_cut_off:
            return state
        shown_open = None if edge is None else self._encode([edge], f"open_{self._new_name()}")
        shown = replace(state, num_shown_parts=len(state.parts), shown_open=shown_open)
        return self._published(shown)

    def _published(self, state: VideoState) -> VideoState:
        """The state with the video that it says in its place, or beside it."""
        sha256 = self._placed.put(state.shown)
        placed = "" if self._placed.found_its_place else state.placed_sha256 or state.film_sha256
        return replace(state, film_sha256=sha256, placed_sha256=placed)

    def _commit(self, state: VideoState) -> None:
        path = self.folder / "film.json"
        with writing(path):
            write_file(path, json.dumps(asdict(state), indent=1).encode("ascii"))
        self._state = state
        self._tidy()

    def _resume(self) -> None:
        """Take up what is in the folder, if it is this film's and sound; else begin anew."""
        path = self.folder / "film.json"
        if path.exists():
            try:
                state = read_state(path)
                if state.settings != self._state.settings:
                    raise ValueError("its rate, quality, direction or VAE is another")
                self._edge = self._check_parts(state)
                self._state = state
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                logger.warning("%s cannot be continued (%s): the video is built anew", self.folder, error)
                path.unlink(missing_ok=True)
        self._tidy()
        if self._state.shown and not (self.path.is_file() and file_sha256(self.path) == self._state.film_sha256):
            self._commit(self._published(self._state))

    def _check_parts(self, state: VideoState) -> Tensor | None:
        """The open frames `[E, H, W, 3]` where they are there; ValueError or OSError for a file not as written."""
        for part in state.named:
            if file_sha256(self.folder / part.file) != part.sha256:
                raise ValueError(f"{part.file} is damaged")
        return None if state.pixels is None else _open_frames(self.folder / state.pixels.file, state)

    def _tidy(self) -> None:
        """Remove what film.json does not name: frames that are no longer open, and what a crash left."""
        named = {part.file for part in self._state.named}
        for path in self.folder.iterdir():
            if path.name.startswith(LEFTOVERS) and path.name not in named:
                with suppress(OSError):  # next time
                    path.unlink()


def _open_frames(path: Path, state: VideoState) -> Tensor:
    """The frames that wait for the next section, as `GrowingVideo._keep` left them. ValueError, OSError for others."""
    shape = (state.num_open, state.height, state.width, 3)
    frames = load(read_regular(path, math.prod(shape) + MOST_HEADER_BYTES)).get("frames")
    if frames is None or frames.dtype != torch.uint8 or tuple(frames.shape) != shape:
        raise ValueError(f"{path.name} does not hold the {state.num_open} open frames")
    return frames


def cross_fade(earlier: Tensor, later: Tensor, overlap: int) -> Tensor:
    """Join uint8 frames `[T, H, W, 3]`: the last `overlap` of `earlier` fade into the first ones of `later`.

    The weights are FramePack's, linspace(1, 0, overlap) and its complement, in whole numbers: the result is the
    same on every machine.
    """
    faded = torch.empty_like(later[:overlap])
    steps = max(overlap - 1, 1)  # a single shared frame is the earlier one, as linspace(1, 0, 1) has it
    for index in range(overlap):
        first, second = earlier[len(earlier) - overlap + index].int(), later[index].int()
        faded[index] = (first * (steps - index) + second * index + steps // 2) // steps
    return torch.cat([earlier[: len(earlier) - overlap], faded, later[overlap:]])


def disk_bytes(num_frames: int, height: int, width: int, overlap: int) -> int:
    """About what a film takes on the disk while it is made: parts, the video and the next one, the open frames."""
    return round(3 * num_frames * height * width * PIXEL_BYTES) + 2 * overlap * height * width * 3
