"""Video files as frames of a wanted size, for models that go on from a video or change one."""

from __future__ import annotations

import subprocess
import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import torch
from torch import Tensor

from .stuck import Watched
from .writer import last_line

HOW = "give an MP4, MOV, MKV or WebM file"


def video_size(path: Path) -> tuple[int, int]:
    """Width and height of a video as it is shown. ValueError where there is none."""
    width, height = _told(path)["size"]
    return width, height


def video_seconds(path: Path) -> float:
    """How long a video lasts, 0 where its file does not say. ValueError where there is none."""
    return float(_told(path)["duration"])


def video_rate(path: Path) -> float:
    """Frames a second of a video. ValueError where there is none, or its file does not say.

    ffmpeg tells two decimals: those of television are meant exactly, such as 30000 / 1001.
    """
    told = float(_told(path)["fps"])
    if not told > 0:
        raise ValueError(f"{path}: this video does not say how many frames a second it has; {HOW}")
    exact = round(told) * 1000 / 1001
    return exact if abs(told - exact) < 0.006 and told != round(told) else told


def read_video(path: Path, width: int, height: int, fps: float, first: int | None = None) -> Tensor:
    """Frames uint8 `[T, height, width, 3]` of a video at `fps`, cropped to the aspect and resized; the `first` so many.

    Frames are doubled or left out where the video has another rate, so that it lasts as long. ValueError where it
    cannot be read.
    """
    with closing(_frames(path, width, height, fps)) as frames:
        kept = list(islice(frames, first))
    if not kept:
        raise ValueError(f"{path}: this video has no frames; {HOW}")
    return torch.stack(kept)


def read_end(path: Path, width: int, height: int, fps: float, last: int) -> tuple[Tensor, int]:
    """At most the `last` so many frames of a video, as `read_video`, and how many come before; only those are held."""
    kept: deque[Tensor] = deque(maxlen=last)
    total = 0
    with closing(_frames(path, width, height, fps)) as frames:
        for frame in frames:
            kept.append(frame)
            total += 1
    if not kept:
        raise ValueError(f"{path}: this video has no frames; {HOW}")
    return torch.stack(list(kept)), total - len(kept)


def read_pieces(path: Path, width: int, height: int, fps: float, num_frames: int = 64) -> Iterator[Tensor]:
    """A whole video as `read_video` gives it, at most `num_frames` at a time."""
    with closing(_frames(path, width, height, fps)) as frames:
        while piece := list(islice(frames, num_frames)):
            yield torch.stack(piece)


def _frames(path: Path, width: int, height: int, fps: float) -> Generator[Tensor, None, None]:
    """Frame after frame, uint8 `[height, width, 3]`; ffmpeg is gone when the iterator is closed."""
    _check_there(path)
    fit = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=lanczos,crop={width}:{height}"
    filters, frame_bytes = f"fps={fps},{fit}", width * height * 3
    program = imageio_ffmpeg.get_ffmpeg_exe()
    source = ["-nostdin", "-v", "error", "-i", str(path.absolute()), "-map", "0:v:0"]
    target = ["-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen([program, *source, *target], stdout=subprocess.PIPE, stderr=complaints)
        assert process.stdout is not None
        watched = Watched(process)
        try:
            while len(frame := _read(watched, frame_bytes)) == frame_bytes:
                yield torch.frombuffer(frame, dtype=torch.uint8).view(height, width, 3)
            if watched.wait() != 0:
                complaints.seek(0)
                reason = watched.stuck or last_line(complaints.read().decode(errors="replace"))
                raise ValueError(f"{path}: cannot be read as a video ({reason}); {HOW}")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _read(watched: Watched, nbytes: int) -> bytearray:
    assert watched.process.stdout is not None
    with watched.working():
        return bytearray(watched.process.stdout.read(nbytes))


def _told(path: Path) -> dict[str, Any]:
    """What ffmpeg says of a video."""
    _check_there(path)
    try:
        with closing(imageio_ffmpeg.read_frames(str(path.absolute()))) as frames:
            return next(frames)
    # what it raises where ffmpeg says nothing of pictures
    except (OSError, RuntimeError, LookupError, ValueError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path}: cannot be read as a video ({last_line(str(error))}); {HOW}") from error


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video; {HOW}")
