"""Video files, written frame by frame as a decoder hands them out."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from types import TracebackType

import imageio_ffmpeg
from torch import Tensor


class VideoWriter:
    """An H.264 mp4 at `path`; frames are uint8 `[T, H, W, 3]`.

    The file grows beside its place and moves there when closed, after an error or Ctrl-C too: what was written by
    then plays. Nothing is left behind when no frame came. Raises ValueError where `path` cannot be written.
    """

    def __init__(self, path: str | Path, fps: float, quality: float = 8.0):
        self.path = check_writable(path)
        self.partial = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        self.fps, self.quality = fps, quality
        self.num_frames = 0
        self.encoder: Generator[None, Tensor | None, None] | None = None

    def write(self, frames: Tensor) -> None:
        """Append frames, uint8 `[T, H, W, 3]`."""
        frames = frames.cpu().contiguous()
        if self.encoder is None:
            _, height, width, _ = frames.shape
            # macro_block_size 2: yuv420p wants even sides, and nothing more; no silent resizing to multiples of 16
            self.encoder = imageio_ffmpeg.write_frames(
                str(self.partial), (width, height), fps=self.fps, quality=self.quality, macro_block_size=2
            )
            self.encoder.send(None)
        for frame in frames:
            self.encoder.send(frame.numpy())
            self.num_frames += 1

    def close(self) -> None:
        """Finish the file and move it to its place; may be called twice."""
        if self.encoder is not None:
            self.encoder.close()
            self.encoder = None
            os.replace(self.partial, self.path)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_writable(path: str | Path) -> Path:
    """`path` with its folder made; ValueError where a file cannot be written there, before hours are spent."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file name such as {path / 'video.mp4'}")
    probe = path.with_name(f"{path.name}.writable")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another output path") from error
    return path
