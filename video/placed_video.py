"""The video that a film shows, where players look for it: replaced whole, also while one of them has it open."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..system.atomic_files import name_beside, partial_name, replace_file, write_file
from .growing_state import VideoPart
from .tags import Tags
from .writer import flush_file, join_videos, writing

logger = logging.getLogger(__name__)

COMING = "film.json.coming"  # the SHA-256 of the video that is put in its place now


class PlacedVideo:
    """The video at `path`, joined of parts in `folder`; Windows lets nobody replace a file that a player has open."""

    def __init__(self, folder: Path, path: Path, fps: float, tags: Tags) -> None:
        self.folder, self.path, self.fps, self.tags = folder, path, fps, tags
        self._elsewhere: Path | None = None

    @property
    def found_its_place(self) -> bool:
        """Whether it is at `path`."""
        return self._elsewhere is None

    @property
    def current(self) -> Path:
        """Where it is: at `path`, or under another name beside it."""
        return self._elsewhere or self.path

    @property
    def was_cut_off(self) -> bool:
        """Whether one was put in its place that no state has come to say."""
        return (self.folder / COMING).exists()

    def put(self, parts: Sequence[VideoPart]) -> str:
        """Join the parts beside the video's place, move them there, and return their SHA-256. Raises VideoError."""
        stem = self.path.with_name(self.path.stem)
        partial = name_beside(stem, f".partial{self.path.suffix}")
        newest = name_beside(stem, f".newest{self.path.suffix}")
        with suppress(OSError):  # ffmpeg would write through a link that somebody has put there
            partial.unlink()
        join_videos([(self.folder / part.file, part.num_frames) for part in parts], partial, self.fps, self.tags)
        with writing(self.path):
            sha256 = flush_file(partial)
            write_file(self.folder / COMING, sha256.encode("ascii"))
            try:
                replace_file(partial, self.path)
            except PermissionError:  # Windows: a player has it open, which is no reason to stop a run of hours
                longer = newest
                try:
                    os.replace(partial, newest)
                except PermissionError:  # that too, as a warning named it
                    longer = partial
                logger.warning("%s is open in another program: the longer video is %s", self.path, longer)
                self._elsewhere = longer
            else:
                self._elsewhere = None
                with suppress(PermissionError):  # next time
                    newest.unlink(missing_ok=True)
        return sha256

    def settle(self) -> bool:
        """Nothing more is shown for now: one beside its place has that at last, which is True, or a name of its own."""
        if self._elsewhere is None:
            return False
        try:
            replace_file(self._elsewhere, self.path)
        except OSError:
            own = partial_name(self.path, self.path.suffix)
            with suppress(OSError):
                self._elsewhere = self._elsewhere.rename(own.with_name(own.name.replace(".partial", "")))
            logger.warning("%s is open in another program: the whole video is %s", self.path, self._elsewhere)
            return False
        self._elsewhere = None
        return True
