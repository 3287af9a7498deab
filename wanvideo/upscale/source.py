"""Videos to be enlarged: of a file, or of pictures that another program has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...system.output_lock import file_sha256
from ...video.given_video import GivenVideo
from ...video.reader import read_pieces, video_rate, video_seconds, video_size
from ...video.sound import Sound
from ...video.writer import check_rate

AT_ONCE = 8  # frames


class VideoSource(Protocol):
    """Small frames and what goes with them; `num_frames` is about how many."""

    width: int
    height: int
    fps: float
    num_frames: int

    @property
    def sound(self) -> Path | Sound | None:
        """The sound, or a file that may have some."""
        ...

    def frames(self) -> Iterator[Tensor]:
        """All of them from the first on, uint8 `[t, h, w, 3]`, a few at a time."""
        ...

    def identity(self) -> Any:
        """What tells it from other videos."""
        ...

    def check(self) -> None:
        """ValueError where it is not what it was any more: frames that were read since then may be of another."""
        ...


class VideoFile:
    """A video file; ValueError where there is none."""

    def __init__(self, path: Path) -> None:
        self.path = self.sound = path
        self._given = GivenVideo(path)
        self.width, self.height = video_size(path)
        self.fps = video_rate(path)
        self.num_frames = round(video_seconds(path) * self.fps)

    def frames(self) -> Iterator[Tensor]:
        return read_pieces(self.path, self.width, self.height, self.fps, AT_ONCE)

    def identity(self) -> Any:
        return file_sha256(self.path)

    def check(self) -> None:
        self._given.check()


class Pictures:
    """Pictures `[T, h, w, 3]` in 0 ... 1, as ComfyUI has them."""

    def __init__(self, images: Tensor, fps: float, sound: Sound | None = None) -> None:
        if images.ndim != 4 or images.shape[3] < 3 or not len(images):
            raise ValueError(f"the pictures are {list(images.shape)}; expected [frames, height, width, 3]")
        check_rate(fps)
        self._images, self.fps, self.sound = images[..., :3], fps, sound
        self.num_frames, self.height, self.width = images.shape[:3]

    def frames(self) -> Iterator[Tensor]:
        for piece in self._images.split(AT_ONCE):
            yield piece.float().mul(255).round_().clamp_(0, 255).byte().cpu()

    def identity(self) -> Any:
        return self._images

    def check(self) -> None: ...
