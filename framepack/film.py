"""The video of a run: it grows section by section, and plays whole after each."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..diffusion.pictures import to_uint8
from ..video import SUFFIXES, VideoError, VideoWriter, check_writable, join_videos
from ..whole_files import replace_file, write_file

log = logging.getLogger(__name__)

FORMAT = 1  # of the files: a film of another is built anew
PIXEL_BYTES = 0.25  # of H.264 at crf 12 without B-frames, for pictures with noise of 10 in 255; most take far less


@dataclass(frozen=True)
class _Part:
    """A piece of the film, encoded; `pixels` names its frames as they were, where they may still change."""

    video: str
    num_frames: int
    sha256: str
    pixels: str | None = None
    pixels_sha256: str | None = None


@dataclass(frozen=True)
class _State:
    """What film.json says: the settings, and the parts in play order."""

    format: int
    fps: float
    crf: int
    grows: str
    made_by: str = ""
    num_sections: int = 0
    height: int = 0
    width: int = 0
    parts: tuple[_Part, ...] = ()
    film_sha256: str = ""  # of the whole video


class Film:
    """A video at `path` that grows at the front (`grows="front"`, later sections play earlier) or at the back.

    Neighbouring sections share frames and are cross-faded there. The frames at the growing edge wait for the next
    section, unencoded in `folder`; all others are encoded once, into parts that are copied together into the
    video. The video is replaced when the next is complete, so it plays at any moment. What the process leaves
    in `folder`, however it ends, is taken up again: `num_sections` are there already. The folder is the film's alone.
    `crf` is x264's quality; `made_by` names what decodes the frames: a film of another is built anew. Raises
    ValueError where `path` cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        path: str | Path,
        fps: float = 30,
        crf: int = 12,
        grows: Literal["front", "back"] = "back",
        made_by: str = "",
    ) -> None:
        if grows not in ("front", "back"):
            raise ValueError(f'grows is {grows!r}; a film grows at its "front" or at its "back"')
        self.folder, self.path = folder, check_writable(path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is no video file name: end it in {' or '.join(SUFFIXES)}")
        check_writable(folder / "film.json")
        self._state = _State(FORMAT, float(fps), crf, grows, made_by)
        self._edge: Tensor | None = None  # uint8 [E, H, W, 3]
        self._resume()

    @property
    def num_sections(self) -> int:
        """How many sections are in the film; the next `add` is for the one after them."""
        return self._state.num_sections

    @property
    def num_frames(self) -> int:
        """How many frames the video has."""
        return sum(part.num_frames for part in self._state.parts)

    def add(self, frames: Tensor, overlap: int) -> None:
        """The next section: `[T, H, W, 3]`, uint8 or floats in -1 ... 1, all sections of one size.

        `overlap` frames are shared with the film so far, and as many wait for the next section. They are faded
        linearly, as FramePack's `soft_append_bcthw` does. Raises ValueError for frames that do not fit and
        VideoError, with the film as it was, where something cannot be written.
        """
        frames = self._check(frames, overlap)
        if self._edge is not None:
            earlier, later = (frames, self._edge) if self._at_front else (self._edge, frames)
            frames = cross_fade(earlier, later, overlap)
        still_open = min(overlap, len(frames))
        sizes = [still_open, len(frames) - still_open]
        if self._at_front:
            edge, final = frames.split(sizes)
        else:
            final, edge = frames.split(sizes[::-1])
        name = self._new_name()
        self._grow(self._encode([final], f"final_{name}"), edge, name)

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

        name = self._new_name()
        part = self._encode(final(), f"final_{name}")
        if edge is None:
            raise ValueError(f"there are no frames to begin {self.path} with: give a video that has some")
        self._grow(part, edge, name)

    def finish(self) -> None:
        """No section follows: what was kept for the next one, unencoded, is removed. VideoError as `add`."""
        parts = tuple(replace(part, pixels=None, pixels_sha256=None) for part in self._state.parts)
        if parts != self._state.parts:
            self._commit(replace(self._state, parts=parts))
            self._edge = None
            self._tidy()

    @staticmethod
    def is_at(folder: Path, path: Path) -> bool:
        """Whether the file at `path` is the video that the film in `folder` wrote last."""
        try:
            return _sha256(path) == _read_state(folder / "film.json").film_sha256
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _new_name(self) -> str:
        """Never used before: nothing that the last film.json names is written over."""
        return f"{self.num_sections:04d}-{secrets.token_hex(4)}"

    def _grow(self, final: _Part | None, edge: Tensor, name: str) -> None:
        """Take in a section's encoded frames and those that wait for the next."""
        new = [final, self._encode([edge], f"open_{name}", pixels=edge)]
        kept = [part for part in self._state.parts if part.pixels is None]
        ordered = [*new[::-1], *kept] if self._at_front else [*kept, *new]
        parts = tuple(part for part in ordered if part is not None)
        # The video first: after a crash in between it is one section ahead, and the same section comes again.
        self._commit(
            replace(
                self._state,
                num_sections=self.num_sections + 1,
                height=edge.shape[1],
                width=edge.shape[2],
                parts=parts,
                film_sha256=self._publish(parts),
            )
        )
        self._edge = edge.clone() if len(edge) else None
        self._tidy()

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
        edge = 0 if self._edge is None else len(self._edge)
        if overlap < 0 or (self.num_sections and overlap > min(edge, len(frames))):
            raise ValueError(
                f"section {self.num_sections} of {len(frames)} frames is to overlap the film by {overlap}; "
                f"0 to {min(edge, len(frames))} are possible, as the section before left {edge} open"
            )
        if frames.is_floating_point():
            return to_uint8(frames.permute(3, 0, 1, 2)[None])
        return frames.cpu()

    def _encode(self, pieces: Iterable[Tensor], name: str, pixels: Tensor | None = None) -> _Part | None:
        """Frames as a part, None where there are none; `pixels` are kept beside it as they are."""
        video, kept = self.folder / f"{name}.mp4", self.folder / f"{name}.safetensors"
        with VideoWriter(video, self._state.fps, self._state.crf, b_frames=False) as writer:
            for frames in pieces:
                if len(frames):
                    writer.write(frames)
        if not writer.num_frames:
            return None
        try:
            part = _Part(video.name, writer.num_frames, _flush(video))
            if pixels is not None:
                write_file(kept, save({"frames": pixels.contiguous()}))
                part = replace(part, pixels=kept.name, pixels_sha256=_sha256(kept))
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        return part

    def _publish(self, parts: tuple[_Part, ...]) -> str:
        """Join the parts beside the video's place, move them there, and return their SHA-256."""
        partial = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        newest = self.path.with_name(f"{self.path.stem}.newest{self.path.suffix}")
        join_videos([(self.folder / part.video, part.num_frames) for part in parts], partial, self._state.fps)
        try:
            sha256 = _flush(partial)
            try:
                replace_file(partial, self.path)
            except PermissionError:  # Windows: a player has it open, which is no reason to stop a run of hours
                os.replace(partial, newest)
                log.warning("%s is open in another program: the longer video is %s", self.path, newest)
            else:
                newest.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return sha256

    def _commit(self, state: _State) -> None:
        path = self.folder / "film.json"
        try:
            write_file(path, json.dumps(asdict(state), indent=1).encode("ascii"))
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._state = state

    def _resume(self) -> None:
        """Take up what is in the folder, if it is this film's and sound; else begin anew."""
        path = self.folder / "film.json"
        if path.exists():
            try:
                state = _read_state(path)
                if _settings(state) != _settings(self._state):
                    raise ValueError("its rate, quality, direction or VAE is another")
                self._edge = self._check_parts(state)
                self._state = state
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log.warning("%s cannot be continued (%s): the video is built anew", self.folder, error)
                path.unlink(missing_ok=True)
        self._tidy()
        if self.num_sections and not (self.path.is_file() and _sha256(self.path) == self._state.film_sha256):
            self._commit(replace(self._state, film_sha256=self._publish(self._state.parts)))

    def _check_parts(self, state: _State) -> Tensor | None:
        """The frames that may still change, `[E, H, W, 3]`; ValueError or OSError where a file is not as written."""
        edge = None
        for part in state.parts:
            for name, sha256 in ((part.video, part.sha256), (part.pixels, part.pixels_sha256)):
                if name is not None and _sha256(self.folder / name) != sha256:
                    raise ValueError(f"{name} is damaged")
            if part.pixels is not None:
                edge = load((self.folder / part.pixels).read_bytes())["frames"]
        return edge

    def _tidy(self) -> None:
        """Remove what film.json does not name: parts that are no longer open, and what a crash left."""
        named = {name for part in self._state.parts for name in (part.video, part.pixels)}
        for path in self.folder.iterdir():
            if path.name.startswith(("final_", "open_", "film.json.")) and path.name not in named:
                with suppress(OSError):  # next time
                    path.unlink()


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


def film_bytes(num_frames: int, height: int, width: int, overlap: int) -> int:
    """About what a film takes on the disk while it is made: parts, the video and the next one, the open frames."""
    frame = height * width * 3
    return round(3 * num_frames * height * width * PIXEL_BYTES) + 2 * overlap * frame


def _settings(state: _State) -> tuple[int, float, int, str, str]:
    return state.format, state.fps, state.crf, state.grows, state.made_by


def _read_state(path: Path) -> _State:
    stored: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    return _State(**{**stored, "parts": tuple(_Part(**part) for part in stored["parts"])})


def _flush(path: Path) -> str:
    """Have the disk hold what ffmpeg wrote, and return its SHA-256."""
    with path.open("r+b") as file:  # Windows flushes only what it may write
        os.fsync(file.fileno())
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _cannot_write(path: Path, error: OSError) -> VideoError:
    return VideoError(
        f"{path} cannot be written ({error.strerror}): check the free space and the rights of that folder"
    )
