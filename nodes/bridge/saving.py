"""A new video file in ComfyUI's output folder: whole, or not there."""

from __future__ import annotations

import glob
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...system.output_lock import OutputLock, partial_files
from ...video.codecs import Codec
from ...video.sound import Sound
from ...video.tags import Tags
from ...video.writer import VideoWriter
from . import host


@dataclass(frozen=True)
class NewVideo:
    """A video to be written under a name that no file has yet."""

    prefix: str
    fps: float
    codec: Codec
    crf: int
    tags: Tags
    sound: Sound | None = None

    def write(self, frames: Generator[Tensor, None, None]) -> Path:
        """Write uint8 `[t, H, W, 3]` as they come, and return where.

        After an error or interrupt nothing is left. VideoError, and ValueError for a place that cannot be written.
        """
        lock = self._new_place()
        try:
            writer = VideoWriter(lock.path, self.fps, self.crf, codec=self.codec, tags=self.tags, sound=self.sound)
            try:
                with closing(frames):
                    for piece in frames:
                        host.stop_if_interrupted()
                        writer.write(piece)
                if lock.path.exists():  # put there meanwhile
                    lock.release()
                    lock = self._new_place()
                    writer.path = lock.path
                writer.close()
            except BaseException:
                writer.discard()
                raise
        finally:
            lock.release()
        return writer.path

    def _new_place(self) -> OutputLock:
        """A name of nobody's, held against other ComfyUIs that write to the same folder.

        One of which there is only the part that a killed process left is new: the part is removed.
        """
        for path in host.output_names(self.prefix, ".mp4"):
            parts = partial_files(path)
            if any(file not in parts for file in path.parent.glob(f"{glob.escape(path.stem)}.*")):
                continue
            with suppress(ValueError):  # somebody writes it now
                return OutputLock(path)
        raise AssertionError("numbers never end")


def sound_of(audio: Any, count: int, seconds: float) -> Sequence[Sound | None]:
    """AUDIO as the sound of each of `count` videos so long: its own, or the last one. ValueError for what is none."""
    if audio is None:
        return [None] * count
    waveform: Tensor = audio["waveform"]
    if not waveform.numel():
        return [None] * count
    sounds = [Sound(each, int(audio["sample_rate"])).first(seconds) for each in waveform[:count]]
    return [*sounds, *sounds[-1:] * (count - len(sounds))]
