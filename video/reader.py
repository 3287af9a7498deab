"""Video files as frames of a wanted size, for models that go on from a video or change one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import torch
from torch import Tensor

from .given_video import GivenVideo
from .stuck import Watched
from .writer import last_line

HOW = "give an MP4, MOV, MKV or WebM file"
MOST_ASPECT = 4  # of a pixel's sides
ROUNDED = 0.006  # what two decimals of a rate may be off, and a bit


def video_size(path: Path) -> tuple[int, int]:
    """Width and height of a video as it is shown, in square pixels. ValueError where there is none."""
    return _told(path).size


def video_seconds(path: Path) -> float:
    """How long a video lasts, 0 where its file does not say. ValueError where there is none."""
    return _told(path).seconds


def video_frames(path: Path) -> int:
    """How many frames a video has that all last as long. ValueError where there is none."""
    told = _told(path)
    return round(told.seconds * told.fps)


def video_rate(path: Path) -> float:
    """Frames a second of a video. ValueError where there is none, or its file does not say.

    As a fraction has it, 24000 / 1001 say, where all its frames last as long; else the mean, to two decimals.
    """
    fps = _told(path).fps
    if not fps > 0:
        raise ValueError(f"{path}: this video does not say how many frames a second it has; {HOW}")
    return fps


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


def read_pieces(path: Path, width: int, height: int, fps: float, num_frames: int = 64) -> Generator[Tensor, None, None]:
    """A whole video as `read_video` gives it, at most `num_frames` at a time."""
    with closing(_frames(path, width, height, fps)) as frames:
        while piece := list(islice(frames, num_frames)):
            yield torch.stack(piece)


def _frames(path: Path, width: int, height: int, fps: float) -> Generator[Tensor, None, None]:
    """Frame after frame, uint8 `[height, width, 3]`, all of one file; ffmpeg is gone when the iterator is closed."""
    return GivenVideo(path).checked(_decoded(path, width, height, fps))


def _decoded(path: Path, width: int, height: int, fps: float) -> Generator[Tensor, None, None]:
    _check_there(path)
    square = f"scale='if(between(sar,1/{MOST_ASPECT},{MOST_ASPECT}),round(iw*sar),iw)':ih:flags=lanczos,setsar=1"
    fit = f"{square},scale={width}:{height}:force_original_aspect_ratio=increase:flags=lanczos,crop={width}:{height}"
    filters, frame_bytes = f"fps={fps},{fit}", width * height * 3
    program = imageio_ffmpeg.get_ffmpeg_exe()
    source = ["-nostdin", "-v", "error", "-i", str(path.absolute()), "-map", "0:v:0"]
    target = ["-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    with tempfile.TemporaryFile() as complaints:
        process = _started([program, *source, *target], subprocess.PIPE, complaints)
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


def _started(command: list[str], stdout: int | IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdout=stdout,
        stderr=stderr,
        # as in `writer.py`: Ctrl-C, which may wait for a block, would end the reading in the middle of it
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def _read(watched: Watched, nbytes: int) -> bytearray:
    assert watched.process.stdout is not None
    with watched.working():
        return bytearray(watched.process.stdout.read(nbytes))


@dataclass(frozen=True)
class _Told:
    """What ffmpeg says of a video: its size as it is shown, its rate and how long it lasts, 0 where it does not."""

    size: tuple[int, int]
    fps: float
    seconds: float


def _told(path: Path) -> _Told:
    _check_there(path)
    with tempfile.TemporaryFile() as said:
        try:
            program = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-nostats", "-hide_banner"]
            # a frame is turned as phones mean it, and its checksum comes with the rate as a fraction
            one_frame = ["-map", "0:v:0", "-frames:v", "1", "-f", "framecrc", "-"]
            process = _started([*program, "-i", str(path.absolute()), *one_frame], said, said)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: ffmpeg cannot be started ({error}): reinstall imageio-ffmpeg") from error
        watched = Watched(process)
        watched.ends_well()  # what it says counts
        said.seek(0)
        text = said.read().decode(errors="replace")
    streams = [line for line in text.splitlines() if re.match(r"\s+Stream #.* Video: ", line)]
    sizes = [match for line in streams if (match := re.search(r" (\d+)x(\d+)[ ,\n]", f"{line}\n"))]
    if not sizes:
        raise ValueError(f"{path}: cannot be read as a video ({watched.stuck or last_line(text)}); {HOW}")
    lasts = re.search(r"Duration: (\d+):(\d+):(\d+\.?\d*)", text)
    hours, minutes, seconds = (float(part) for part in lasts.groups()) if lasts else (0.0, 0.0, 0.0)
    size = round(int(sizes[-1][1]) * _pixel_aspect(streams[-1])), int(sizes[-1][2])
    return _Told(size, _rate(streams[0], text), 3600 * hours + 60 * minutes + seconds)


def _rate(stream: str, text: str) -> float:
    """The rate of a stream, 0 where it has none; `text` is all that ffmpeg says."""
    told = re.search(r" (\d+\.?\d*) fps", stream)
    exact = re.search(r"^#tb 0: (\d+)/(\d+)", text, re.MULTILINE)  # of the frame: how long it is shown
    mean = float(told[1]) if told else 0.0
    frames, seconds = (int(exact[2]), int(exact[1])) if exact else (0, 1)
    if seconds and abs(frames / seconds - mean) < ROUNDED:
        return frames / seconds
    television = round(mean) * 1000 / 1001
    return television if abs(television - mean) < ROUNDED and mean != round(mean) else mean


def _pixel_aspect(stream: str) -> float:
    """Width of a stream's pixels by their height; 1 where that is not told, or is nothing that anyone means."""
    told = re.search(r"SAR (\d+):(\d+)", stream)
    wide, high = (int(part) for part in told.groups()) if told else (1, 1)
    return wide / high if wide <= MOST_ASPECT * high and high <= MOST_ASPECT * wide and high else 1.0


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video; {HOW}")
