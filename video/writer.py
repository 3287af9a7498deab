"""Video files, written frame by frame as a decoder hands them out."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import torch
from torch import Tensor

from ..system.atomic_files import naming, partial_name, replace_file
from ..system.output_lock import file_sha256
from ..system.scratch_folders import scratch_folder
from .codecs import H264, Codec
from .sound import Sound
from .stuck import Watched
from .tags import Tags, index_bytes, tag_options, write_tags

SUFFIXES = (".mp4", ".mov", ".mkv")
MOST_FPS = 1000.0
JOIN_SECONDS = 3600.0  # for a whole film, which is only copied
INDEX_BYTES, INDEX_BYTES_PER_FRAME = 2048, 40  # of an MP4, at most: every frame with its time, size, place and kind


class VideoError(OSError):
    """The encoder could not be started, or stopped by itself."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


class VideoWriter:
    """A video at `path`, H.264 unless another `codec` is given; frames are uint8 `[T, H, W, 3]`.

    The file grows beside its place and moves there when closed, after an error or Ctrl-C too: what was written by
    then plays. Nothing is left behind when no frame came. `crf` is the encoder's quality, 0 (best) to 51 or 63.
    An MP4 has `tags`, and its index, at its beginning, where ComfyUI's page looks for a workflow. `is_part` makes a
    file that `join_videos` can join with others: H.264 without tags and `sound`.
    Raises ValueError where `path` cannot be written or the rate is none, and VideoError where ffmpeg cannot go on.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        crf: int = 12,
        is_part: bool = False,
        codec: Codec = H264,
        tags: Tags | None = None,
        sound: Sound | None = None,
    ):
        check_rate(fps)
        self.path = check_video(path)
        self.partial = partial_name(self.path, self.path.suffix)
        self.fps, self.crf, self.is_part = fps, crf, is_part
        self.codec, self.tags, self.sound = codec, tags or {}, sound
        self.num_frames = 0
        self.is_shown = False  # in its place
        self._encoder: subprocess.Popen[bytes] | None = None
        self._inputs = ExitStack()  # the folder of what else ffmpeg reads
        self._watched: Watched | None = None  # ffmpeg, once it runs
        self._complaints: IO[bytes] | None = None

    def write(self, frames: Tensor) -> None:
        """Append frames, uint8 `[T, H, W, 3]`, all of one size; odd sides get one more row or column of pixels."""
        frames = _even(frames.cpu()).contiguous()
        if self._encoder is None:
            self._encoder = self._start(width=frames.shape[2], height=frames.shape[1])
            self._watched = Watched(self._encoder)
        assert self._encoder.stdin is not None and self._watched is not None
        try:
            for frame in frames:
                with self._watched.working():
                    self._encoder.stdin.write(frame.numpy().data)
                self.num_frames += 1
        except OSError:  # a broken pipe: ffmpeg stopped, and closing says why
            self.close()
            raise

    def close(self) -> None:
        """Finish the file and move it to its place; may be called twice. After an interrupt no part of it is left."""
        if self._encoder is None:
            return
        try:
            self._finish(self._encoder)
        except BaseException:  # without its index nothing plays it
            self.discard()
            raise
        self._encoder = None
        self._drop_inputs()

    def _finish(self, encoder: subprocess.Popen[bytes]) -> None:
        assert encoder.stdin is not None and self._watched is not None
        with suppress(OSError), self._watched.working():  # where ffmpeg is gone already
            encoder.stdin.close()
        if self._watched.wait() != 0:
            raise VideoError(self._why_stopped(self._watched.stuck))
        try:
            replace_file(self.partial, self.path)
            self.is_shown = True
        except OSError as error:
            # under a name that is not a partial file's, which the next run would remove
            whole = self.partial.with_name(self.partial.name.replace(".partial", ""))
            with suppress(OSError):
                self.partial = self.partial.rename(whole)
            self._encoder = None  # nothing to discard
            raise VideoError(
                f"{self.path} cannot be written ({error.strerror}): the video is {self.partial}; close what has the "
                "file open, or choose another output path"
            ) from error

    def discard(self) -> None:
        """Leave nothing behind: nobody wants the beginning of this video."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            assert encoder.stdin is not None
            encoder.kill()
            with suppress(OSError):
                encoder.stdin.close()
            encoder.wait()
            self.partial.unlink(missing_ok=True)
        self._drop_inputs()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, width: int, height: int) -> subprocess.Popen[bytes]:
        # imageio_ffmpeg.write_frames would kill ffmpeg when Ctrl-C strikes in a write, and the file with it
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "-"]
        try:
            heard, told = self._other_inputs()
        except OSError as error:
            self._drop_inputs()
            raise VideoError(
                f"{self.path}: its sound or workflow cannot be handed to ffmpeg ({error.strerror}): check the free "
                f"space of {tempfile.gettempdir()}"
            ) from error
        pictures = [*self.codec.options(self.crf, self.path.suffix), *(["-bf", "0"] if self.is_part else [])]
        sound = ["-map", "1:a:0", "-c:a", "aac", "-b:a", "192k"] if heard else ["-an"]
        index_first = () if self.is_part else ("faststart",)
        tags = tag_options(self.tags, 2 if heard else 1, self.path.suffix, index_first)
        target = ["-map", "0:v:0", *sound, *pictures, "-pix_fmt", "yuv420p", *tags, str(self.partial)]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - read when ffmpeg stops
        try:
            return _launch([*source, *heard, *told, *target], self.path, subprocess.PIPE, self._complaints)
        except VideoError:
            self._drop_inputs()
            raise

    def _other_inputs(self) -> tuple[list[str], list[str]]:
        """ffmpeg's options that read sound and tags, which lie in files for as long as it runs."""
        if not self.tags and self.sound is None:
            return [], []
        folder = self._inputs.enter_context(scratch_folder(Path(tempfile.gettempdir())))
        heard = [] if self.sound is None else self.sound.write(folder / "sound")
        told = ["-f", "ffmetadata", "-i", str(write_tags(self.tags, folder / "tags"))] if self.tags else []
        return heard, told

    def _drop_inputs(self) -> None:
        self._inputs.close()

    def _why_stopped(self, stuck: str) -> str:
        return (
            f"{self.path}: ffmpeg stopped after {self.num_frames} frames ({stuck or _reason(self._complaints)}): "
            "check the free space and the rights of that folder"
        )


def join_videos(parts: Sequence[tuple[Path, int]], path: Path, fps: float, tags: Tags | None = None) -> None:
    """Write `parts`, (file, number of frames) in play order, to `path` as one video, with their pictures as encoded.

    The parts lie in one folder, have names of letters, digits, `_`, `-` and `.`, and come from VideoWriters of one
    size, rate and quality with `is_part`: then decoding and showing order are the same, and times fit at every joint.
    The video has `tags`, and an MP4 them and its index at its beginning. Raises VideoError where ffmpeg cannot go on;
    what it has written of `path` is removed then, as it is after Ctrl-C.
    """
    folder = parts[0][0].parent
    lines, frames_before = [], 0
    for part, num_frames in parts:
        assert part.parent == folder and re.fullmatch(r"[\w.-]+", part.name), part
        # ffmpeg counts microseconds, and adds them up: no part may round on its own
        start, end = (round(frames * 1e6 / fps) for frames in (frames_before, frames_before + num_frames))
        lines += [f"file {part.name}", f"duration {(end - start) / 1e6:.6f}"]
        frames_before += num_frames
    listing, told = folder / "parts.txt", folder / "tags.txt"
    try:
        for place in (listing, told, path):  # what lies there may be a link, and neither ffmpeg nor Python minds
            place.unlink(missing_ok=True)
        with naming(listing), listing.open("x", encoding="ascii") as file:
            file.write("\n".join(["ffconcat version 1.0", *lines, ""]))
        # from within the folder no path has to be quoted
        sources = ["-f", "concat", "-i", listing.name]
        if tags:
            with naming(told):
                sources += ["-f", "ffmetadata", "-i", write_tags(tags, told).name]
        options = _joined(path, frames_before, tags or {})
        with tempfile.TemporaryFile() as complaints:
            process = _launch([*sources, *options, str(path.absolute())], path, subprocess.DEVNULL, complaints, folder)
            joining = Watched(process, JOIN_SECONDS)
            if not joining.ends_well():
                raise VideoError(
                    f"{path}: ffmpeg could not join {len(parts)} parts ({joining.stuck or _reason(complaints)}): "
                    "check the free space and the rights of that folder"
                )
    except BaseException:  # Ctrl-C too: half a video plays nowhere
        path.unlink(missing_ok=True)
        raise
    finally:
        listing.unlink(missing_ok=True)
        told.unlink(missing_ok=True)


def add_sound(path: Path, heard: Path | Sound) -> None:
    """Give the video at `path` the sound of another file, where that has one, or this one; pictures stay as they are.

    The other's is copied where a file of this kind may have it so, else encoded as AAC. VideoError where it cannot be.
    """
    partial = partial_name(path, path.suffix)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder(Path(tempfile.gettempdir())))
        source = heard.write(folder / "sound") if isinstance(heard, Sound) else ["-i", str(heard.absolute())]
        tags = ["-map_metadata", "0"]
        if path.suffix.lower() in (".mp4", ".mov"):
            tags += ["-movflags", "+use_metadata_tags+faststart"]
        ways = [["aac", "-b:a", "192k"]] if isinstance(heard, Sound) else [["copy"], ["aac", "-b:a", "192k"]]
        try:
            for way in ways:
                streams = ["-map", "0:v:0", "-map", "1:a:0?", "-c:v", "copy", "-c:a", *way]
                complaints = stack.enter_context(tempfile.TemporaryFile())
                arguments = ["-i", str(path.absolute()), *source, *streams, *tags, str(partial.absolute())]
                process = Watched(_launch(arguments, path, subprocess.DEVNULL, complaints), JOIN_SECONDS)
                if process.ends_well():
                    replace_file(partial, path)
                    return
            raise VideoError(f"{path}: ffmpeg could not add the sound ({process.stuck or _reason(complaints)})")
        finally:
            partial.unlink(missing_ok=True)


def _joined(path: Path, num_frames: int, tags: Tags) -> list[str]:
    """ffmpeg's options for a video of so many frames that were encoded before."""
    # the index comes first, in room left for it: +faststart would write everything twice
    room = str(INDEX_BYTES + INDEX_BYTES_PER_FRAME * num_frames + index_bytes(tags))
    index_first = ["-moov_size", room] if path.suffix.lower() in (".mp4", ".mov") else []
    return ["-map", "0:v:0", "-c", "copy", *tag_options(tags, 1, path.suffix), *index_first]


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
            env={**os.environ, "SVT_LOG": "1"},  # errors alone: its greeting would pass for one
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
    probe = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()  # of a name that nobody can have put a link to
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another output path") from error
    return path


def check_rate(fps: float) -> None:
    """ValueError for what is no rate of a video, NaN too."""
    if not 0 < fps <= MOST_FPS:
        raise ValueError(f"fps is {fps}: use a number above 0, up to {MOST_FPS:g}, such as 16")


def check_video(path: str | Path) -> Path:
    """The same for a video: ValueError too for a name that does not end as one's."""
    written = check_writable(path)
    if written.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no video file name: end it in {' or '.join(SUFFIXES)}")
    return written


def flush_file(path: Path) -> str:
    """Have the disk hold what ffmpeg wrote, and return its SHA-256."""
    with path.open("r+b") as file:  # Windows flushes only what it may write
        os.fsync(file.fileno())
    return file_sha256(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have errors of the system say what cannot be written, as a VideoError."""
    try:
        yield
    except OSError as error:
        raise VideoError(
            f"{path} cannot be written ({error.strerror}): check the free space and the rights of that folder"
        ) from error


def _even(frames: Tensor) -> Tensor:
    """Frames with even sides, as yuv420p wants them: the last row and column are repeated where needed."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3]")
    if frames.shape[1] % 2:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    if frames.shape[2] % 2:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    return frames
