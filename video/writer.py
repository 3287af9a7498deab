"""Video files, written frame by frame as a decoder hands them out."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import imageio_ffmpeg
import torch
from torch import Tensor

from ..system.atomic_files import name_beside, partial_name, replace_file

SUFFIXES = (".mp4", ".mov", ".mkv")
INDEX_BYTES, INDEX_BYTES_PER_FRAME = 2048, 40  # of an MP4, at most: every frame with its time, size, place and kind


class VideoError(OSError):
    """The encoder could not be started, or stopped by itself."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


class VideoWriter:
    """An H.264 video at `path`; frames are uint8 `[T, H, W, 3]`.

    The file grows beside its place and moves there when closed, after an error or Ctrl-C too: what was written by
    then plays. Nothing is left behind when no frame came. `crf` is x264's quality, 0 (lossless) to 51.
    `b_frames=False` makes a file that `join_videos` can join with others.
    Raises ValueError where `path` cannot be written and VideoError where ffmpeg cannot go on.
    """

    def __init__(self, path: str | Path, fps: float, crf: int = 12, b_frames: bool = True):
        self.path = check_writable(path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is no video file name: end it in {' or '.join(SUFFIXES)}")
        self.partial = partial_name(self.path, self.path.suffix)
        self.fps, self.crf, self.b_frames = fps, crf, b_frames
        self.num_frames = 0
        self._encoder: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None

    def write(self, frames: Tensor) -> None:
        """Append frames, uint8 `[T, H, W, 3]`, all of one size; odd sides get one more row or column of pixels."""
        frames = _even(frames.cpu()).contiguous()
        if self._encoder is None:
            self._encoder = self._start(width=frames.shape[2], height=frames.shape[1])
        assert self._encoder.stdin is not None
        try:
            for frame in frames:
                self._encoder.stdin.write(frame.numpy().data)
                self.num_frames += 1
        except OSError:  # a broken pipe: ffmpeg stopped, and closing says why
            self.close()
            raise

    def close(self) -> None:
        """Finish the file and move it to its place; may be called twice."""
        encoder, self._encoder = self._encoder, None
        if encoder is None:
            return
        assert encoder.stdin is not None
        with suppress(OSError):  # where ffmpeg is gone already
            encoder.stdin.close()
        if encoder.wait() != 0:
            self.partial.unlink(missing_ok=True)  # without its index nothing plays it
            raise VideoError(self._why_stopped())
        try:
            replace_file(self.partial, self.path)
        except OSError as error:
            # under a name that is not a partial file's, which the next run would remove
            whole = self.partial.with_name(self.partial.name.replace(".partial", ""))
            with suppress(OSError):
                self.partial = self.partial.rename(whole)
            raise VideoError(
                f"{self.path} cannot be written ({error.strerror}): the video is {self.partial}; close what has the "
                "file open, or choose another output path"
            ) from error

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, width: int, height: int) -> subprocess.Popen[bytes]:
        # imageio_ffmpeg.write_frames would kill ffmpeg when Ctrl-C strikes in a write, and the file with it
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "-"]
        options = ["-c:v", "libx264", "-crf", str(self.crf), *([] if self.b_frames else ["-bf", "0"])]
        target = ["-an", *options, "-pix_fmt", "yuv420p", str(self.partial)]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - read when ffmpeg stops
        return _launch([*source, *target], self.path, subprocess.PIPE, self._complaints)

    def _why_stopped(self) -> str:
        return (
            f"{self.path}: ffmpeg stopped after {self.num_frames} frames ({_reason(self._complaints)}): "
            "check the free space and the rights of that folder"
        )


def join_videos(parts: Sequence[tuple[Path, int]], path: Path, fps: float) -> None:
    """Write `parts`, (file, number of frames) in play order, to `path` as one video, with their pictures as encoded.

    The parts lie in one folder, have names of letters, digits, `_`, `-` and `.`, and come from VideoWriters of one
    size, rate and quality with `b_frames=False`: then decoding and showing order are the same, and times fit at
    every joint. Raises VideoError where ffmpeg cannot go on; what it has written of `path` is removed then, as it is
    after Ctrl-C.
    """
    folder = parts[0][0].parent
    lines, frames_before = [], 0
    for part, num_frames in parts:
        assert part.parent == folder and re.fullmatch(r"[\w.-]+", part.name), part
        # ffmpeg counts microseconds, and adds them up: no part may round on its own
        start, end = (round(frames * 1e6 / fps) for frames in (frames_before, frames_before + num_frames))
        lines += [f"file {part.name}", f"duration {(end - start) / 1e6:.6f}"]
        frames_before += num_frames
    listing = folder / "parts.txt"
    # the index comes first, in room left for it: +faststart would write everything twice
    room = str(INDEX_BYTES + INDEX_BYTES_PER_FRAME * frames_before)
    index_first = ["-moov_size", room] if path.suffix.lower() in (".mp4", ".mov") else []
    try:
        listing.write_text("\n".join(["ffconcat version 1.0", *lines, ""]), encoding="ascii")
        with tempfile.TemporaryFile() as complaints:
            arguments = ["-f", "concat", "-i", listing.name, "-c", "copy", *index_first, str(path.absolute())]
            # from within the folder no path has to be quoted
            process = _launch(arguments, path, subprocess.DEVNULL, complaints, folder)
            try:
                failed = process.wait() != 0
            finally:
                process.kill()  # after Ctrl-C; else it has ended
                process.wait()
            if failed:
                raise VideoError(
                    f"{path}: ffmpeg could not join {len(parts)} parts ({_reason(complaints)}): "
                    "check the free space and the rights of that folder"
                )
    except BaseException:  # Ctrl-C too: half a video plays nowhere
        path.unlink(missing_ok=True)
        raise
    finally:
        listing.unlink(missing_ok=True)


def _launch(
    arguments: list[str], path: Path, stdin: int, complaints: IO[bytes], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """ffmpeg with `arguments`, started in `folder`; VideoError naming `path` where it cannot be."""
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        if os.path.dirname(program):
            program = os.path.abspath(program)  # it is found from `folder` too
        return subprocess.Popen(
            [program, "-y", "-v", "error", *arguments],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            cwd=folder,
            # out of the terminal's process group, so that Ctrl-C does not stop it
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
    except (OSError, RuntimeError) as error:
        raise VideoError(
            f"{path}: ffmpeg cannot be started ({error}): reinstall imageio-ffmpeg, "
            "or name an ffmpeg with the environment variable IMAGEIO_FFMPEG_EXE"
        ) from error


def _reason(complaints: IO[bytes] | None) -> str:
    """The last line of what ffmpeg said."""
    if complaints is None:
        return "no reason given"
    complaints.seek(0)
    return last_line(complaints.read().decode(errors="replace"))


def last_line(text: str) -> str:
    """The last line of a program's messages that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def check_writable(path: str | Path) -> Path:
    """`path` with its folder made; ValueError where a file cannot be written there, before hours are spent."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file name such as {path / 'video.mp4'}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{path} is write-protected: choose another output path")
    probe = name_beside(path, ".writable")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another output path") from error
    return path


def _even(frames: Tensor) -> Tensor:
    """Frames with even sides, as yuv420p wants them: the last row and column are repeated where needed."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3]")
    if frames.shape[1] % 2:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    if frames.shape[2] % 2:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    return frames
