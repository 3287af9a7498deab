"""A video file made larger into another: written as frames come, and taken up again where it was stopped."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...runtime.kept_runs import end_run, give_up, is_given_up, open_run
from ...runtime.latent_watch import BadLatents
from ...runtime.progress import Progress
from ...system.content_key import run_key
from ...system.output_lock import is_noted, note_output
from ...system.scratch_folders import scratch_folder
from ...vae.frame_watch import BadFrames
from ...video.growing_video import GrowingVideo
from ...video.tags import Tags
from ...video.writer import add_sound
from .frames import in_order
from .kept_stream import KeptStream
from .request import UpscaleRequest
from .run import Upscaler
from .source import VideoSource
from .stream import UpscaleStream, frames_of, made

logger = logging.getLogger(__name__)

SECTION_STEPS = 4  # whose frames are encoded together: 32 frames
GOOD_CRF, MOST_CRF = 16, 51
SAFELY = " on the safe path"
NOT_KEPT = "the run cannot be kept in %s (%s)"


@dataclass(frozen=True)
class FilmPlace:
    """Where the large video goes, and where what a stopped run goes on from is kept (None: nowhere).

    ValueError for a `crf` that H.264 has not.
    """

    output: Path
    runs: Path | None = None
    crf: int = GOOD_CRF
    tags: Tags = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= MOST_CRF:
            raise ValueError(f"crf is {self.crf}; expected 0 to {MOST_CRF}: 16 is good, lower is better and larger")


class UpscaleFilm:
    """One video made larger, once; `num_frames` and `folder` say what came of it, also after an error."""

    def __init__(
        self, upscaler: Upscaler, source: VideoSource, request: UpscaleRequest, progress: Progress | None = None
    ) -> None:
        request.check()
        self._upscaler, self._source, self._request = upscaler, source, request
        self._progress = progress or upscaler.progress
        self.num_frames = 0
        self.folder: Path | None = None  # of what is kept

    def key(self, place: FilmPlace) -> str:
        """What tells this run from others."""
        settings = self._upscaler.run_settings(self._request)
        source = self._source
        return run_key({**settings, "source": source.identity(), "fps": float(source.fps), "crf": place.crf})

    def make(self, place: FilmPlace) -> None:
        """Make the video at `place.output`, with the source's rate and sound.

        What was made by then plays there meanwhile, and after an error or interrupt. With `place.runs` a run that was
        stopped goes on, bit for bit. Where a network makes no numbers it is begun anew on the safe path, once;
        BadLatents or BadFrames where even so. ValueError, PlanError, VideoError.
        """
        self._upscaler.planned(self._request, (self._source.width, self._source.height))
        with self._folder(place) as folder:
            try:
                self._make_sound(place, folder)
            finally:  # the next video is known by how the network computes
                self._upscaler.leave_safe_path()

    def _make_sound(self, place: FilmPlace, folder: _RunFolder) -> None:
        """The video, of one path alone: both compute otherwise."""
        upscaler = self._upscaler
        if not folder.is_unsound:
            try:
                self._make_in(place, folder)
                return
            except (BadLatents, BadFrames) as error:
                if not upscaler.take_safe_path():
                    raise
                logger.warning("%s: the video begins anew with exact attention, in %s", error, upscaler.dtype)
                folder.give_up(str(error), place.output)
        # outside the handler: its traceback holds tensors
        upscaler.take_safe_path()
        self._make_in(place, folder, SAFELY)

    def _make_in(self, place: FilmPlace, folder: _RunFolder, how: str = "") -> None:
        source, kept, made_by = self._source, folder.kept(how), f"FlashVSR{how}"
        film = GrowingVideo(
            film_folder(folder.path), place.output, source.fps, place.crf, made_by=made_by, tags=place.tags
        )
        if kept is not None and kept.has_whole(film):
            self._said(film.num_frames)  # but for its sound
        else:
            with self._upscaler.opened(self._request, (source.width, source.height), folder.path) as stream:
                _Making(stream, film, kept, source, self._said, self._upscaler.model.between_blocks).run()
        if source.sound is not None:
            source.check()
            add_sound(film.video, source.sound)

    def is_own(self, place: FilmPlace, path: Path) -> bool:
        """Whether this run, which was stopped, wrote the file that is at `path`."""
        if place.runs is None:
            return False
        key = self.key(place)
        return GrowingVideo.is_at(film_folder(place.runs / key[:16]), path) or is_noted(place.runs, path, key)

    def _said(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self._progress.update(num_frames, max(num_frames, self._source.num_frames))

    @contextmanager
    def _folder(self, place: FilmPlace) -> Iterator[_RunFolder]:
        """The run's folder, held; it is removed when the video is whole."""
        if place.runs is None:
            with scratch_folder(Path(tempfile.gettempdir())) as scratch:
                yield _RunFolder(scratch)
            return
        key = self.key(place)
        self.folder, lock = open_run(place.runs, key)
        try:
            yield _RunFolder(self.folder, key)
            end_run(self.folder, lock)
        finally:
            lock.release()


def film_folder(folder: Path) -> Path:
    """Where a run's folder has its film."""
    return folder / "film"


@dataclass(frozen=True)
class _RunFolder:
    """Where a run has its film, and what it goes on from unless `key`, which tells it from others, is empty."""

    path: Path
    key: str = ""

    def kept(self, how: str) -> KeptStream | None:
        """What is kept of what the network made in this way: another's is refused."""
        return KeptStream(self.path, self.key + how) if self.key else None

    @property
    def is_unsound(self) -> bool:
        return is_given_up(self.path)

    def give_up(self, reason: str, output: Path) -> None:
        """Nothing that was kept is gone on from; the run knows what it has shown at `output` as its own, though."""
        with suppress(OSError):
            if GrowingVideo.is_at(film_folder(self.path), output):
                note_output(self.path, output, self.key)
            for state in self.path.glob("state_*"):
                shutil.rmtree(state, ignore_errors=True)
            give_up(self.path, reason)


class _Making:
    """The loop over a video's windows."""

    def __init__(
        self,
        stream: UpscaleStream,
        film: GrowingVideo,
        kept: KeptStream | None,
        source: VideoSource,
        on_frames: Callable[[int], None],
        look_up: Callable[[], None] | None,
    ) -> None:
        """`look_up` may raise to stop, and is called while frames that were made before are passed over."""
        self._stream, self._film, self._kept, self._on_frames = stream, film, kept, on_frames
        self._source, self._look_up = source, look_up
        self._small = _Counted(in_order(source.frames(), 0))
        self._open: list[Tensor] = []  # frames of the section that is being made
        self._num_sections = 0

    def run(self) -> None:
        try:
            self._make(self._take_up())
        except BaseException:  # an interrupt too
            self._film.leave()
            raise
        self._film.finish()
        if self._kept is not None:
            self._kept.note_whole(self._film)

    def _make(self, last: Tensor | None) -> None:
        """All frames that are wanted still, `last` the small one before them."""
        self._on_frames(self._num_made)
        self._warn_of_room()
        try:
            for frames in made(self._stream, self._small, last):
                self._open.append(frames)
                if self._stream.num_steps % SECTION_STEPS == 0:
                    self._end_section()
                self._on_frames(self._num_made)
                if not self._open and self._kept is not None and self._kept.is_due(self._stream):
                    self._save()
            if self._open:
                self._end_section()
        except BaseException:
            self._save()
            raise

    def _warn_of_room(self) -> None:
        """Say it before hours are spent where there is no room for what a stopped run goes on from."""
        if self._kept is None:
            return
        try:
            self._kept.check_room(self._stream)
        except OSError as error:
            logger.warning(NOT_KEPT, self._kept.folder, error)

    @property
    def _num_made(self) -> int:
        return min(self._stream.num_made, self._small.count)

    def _take_up(self) -> Tensor | None:
        """Go on from what was kept: the small frame that was taken last, or None at the beginning."""
        if self._kept is None:
            return None
        try:
            found = self._kept.restore(self._stream, self._passed_over())
            if found is None:
                return None
            num_sections = self._stream.num_steps // SECTION_STEPS
            if num_sections > self._film.num_sections:
                raise ValueError("the beginning of the film is gone")
            num_open = 0 if found[1] is None else len(found[1])
            if num_open != self._stream.num_made - frames_of(num_sections * SECTION_STEPS):
                raise ValueError("frames are gone")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("what %s keeps is no use (%s): the video is begun anew", self._kept.folder, error)
            self._stream.begin_anew()
            self._small = _Counted(in_order(self._source.frames(), 0))
            return None
        last, open_frames = found
        self._open, self._num_sections = [] if open_frames is None else [open_frames], num_sections
        return last

    def _passed_over(self) -> Iterator[Tensor]:
        """The small frames, of a video of an hour maybe, with a look whether to stop before each."""
        for frame in self._small:
            if self._look_up is not None:
                self._look_up()
            yield frame

    def _end_section(self) -> None:
        """The section's frames into the film, unless it has them: a run that was killed made more than it kept."""
        self._source.check()
        if self._num_sections == self._film.num_sections:
            self._film.add(torch.cat(self._open), 0)
        self._num_sections, self._open = self._num_sections + 1, []

    def _save(self) -> None:
        """Keep all there is, where that is whole, of one video, and of frames that are no end's repetition."""
        try:
            self._source.check()
        except ValueError:  # what was kept before is sound
            return
        stream, kept = self._stream, self._kept
        num_open = sum(map(len, self._open))
        whole = stream.is_whole and num_open == stream.num_made - frames_of(self._num_sections * SECTION_STEPS)
        is_begun = stream.num_steps and self._num_sections <= self._film.num_sections
        if kept is None or not is_begun or not whole or self._small.count < stream.num_taken:
            return
        try:
            kept.save(stream, torch.cat(self._open) if self._open else None)
        except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
            logger.warning(NOT_KEPT, kept.folder, error)


class _Counted:
    """An iterator that says how many it gave."""

    def __init__(self, frames: Iterator[Tensor]) -> None:
        self._frames = frames
        self.count = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Tensor:
        frame = next(self._frames)
        self.count += 1
        return frame
