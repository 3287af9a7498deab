"""Video files: what is in them, and what is left after an error, Ctrl-C or a full disk."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from lowvram_video.system.atomic_files import replace_file
from lowvram_video.video.growing_video import GrowingVideo
from lowvram_video.video.reader import video_rate, video_seconds
from lowvram_video.video.sound import Sound
from lowvram_video.video.stuck import Watched
from lowvram_video.video.writer import VideoError, VideoWriter, add_sound, check_writable
from lowvram_video.wanvideo.upscale.source import Pictures
from torch import Tensor


def clip(num_frames: int = 9, height: int = 48, width: int = 64) -> Tensor:
    """A smooth picture that changes: a lossy encoder keeps it nearly."""
    t, y, x = torch.meshgrid(torch.arange(num_frames), torch.arange(height), torch.arange(width), indexing="ij")
    channels = [80 + 2 * x + 6 * t, 60 + 2 * y + 0 * t, 200 - x - 8 * t]
    return torch.stack(channels, dim=-1).clamp(0, 255).to(torch.uint8)


def read(path: Path) -> tuple[dict, Tensor]:
    frames = imageio_ffmpeg.read_frames(str(path))
    meta = next(frames)
    width, height = meta["size"]
    pictures = [np.frombuffer(frame, dtype=np.uint8).reshape(height, width, 3) for frame in frames]
    return meta, torch.from_numpy(np.stack(pictures))


def test_an_mp4_is_h264_and_holds_the_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    frames = clip()
    with VideoWriter(path, 16) as writer:
        writer.write(frames[:1])
        writer.write(frames[1:5])
        writer.write(frames[5:])
    assert writer.num_frames == 9
    meta, decoded = read(path)
    assert (meta["codec"], meta["fps"], meta["size"]) == ("h264", 16.0, (64, 48))
    assert meta["pix_fmt"].startswith("yuv420p")
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 9
    assert decoded.shape == frames.shape
    error = (decoded.float() - frames.float()).abs()
    print(f"h264: mean error {float(error.mean()):.2f} of 255, largest {float(error.max()):.0f}")
    assert float(error.mean()) < 2
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(("height", "width", "stored"), [(49, 65, (66, 50)), (48, 65, (66, 48)), (50, 66, (66, 50))])
def test_odd_sides_get_one_pixel_more_and_no_resizing(
    tmp_path: Path, height: int, width: int, stored: tuple[int, int]
) -> None:
    frames = clip(3, height, width)
    with VideoWriter(tmp_path / "a.mp4", 8) as writer:
        writer.write(frames)
    meta, decoded = read(tmp_path / "a.mp4")
    assert meta["size"] == stored
    assert float((decoded[:, :height, :width].float() - frames.float()).abs().mean()) < 2


def test_a_fractional_rate(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 23.976) as writer:
        writer.write(clip())
    assert read(tmp_path / "a.mp4")[0]["fps"] == pytest.approx(23.976, abs=0.01)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_file_plays(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(error), VideoWriter(path, 16) as writer:
        writer.write(clip(5))
        raise error
    assert len(read(path)[1]) == 5
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_an_interrupt_inside_a_frame_leaves_the_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 16) as writer:
        writer.write(clip(5))
        assert writer._encoder is not None and writer._encoder.stdin is not None
        writer._encoder.stdin.write(b"part of a frame")
        raise KeyboardInterrupt
    assert len(read(path)[1]) == 5


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["wait", "working"])
def test_an_interrupt_while_a_file_is_finished_leaves_nothing(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 16)
    writer.write(clip(5))
    encoder = writer._encoder
    with monkeypatch.context() as struck, pytest.raises(KeyboardInterrupt):
        struck.setattr(Watched, where, interrupted)
        writer.close()
    assert encoder is not None and encoder.poll() is not None
    writer.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("move", [replace_file, interrupted], ids=["moved", "not moved"])
def test_an_interrupt_while_a_file_is_moved_leaves_all_or_nothing(
    tmp_path: Path, move: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(source: Path, target: Path) -> None:
        move(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("lowvram_video.video.writer.replace_file", struck)
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(clip(5))
    assert os.listdir(tmp_path) == (["a.mp4"] if move is replace_file else [])


def test_an_interrupt_while_sound_is_added_leaves_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(clip(5))
    before, started = (tmp_path / "a.mp4").read_bytes(), []

    def struck(watched: Watched) -> int:
        started.append(watched.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(Watched, "wait", struck)
    with pytest.raises(KeyboardInterrupt):
        add_sound(tmp_path / "a.mp4", Sound(torch.zeros(1, 4410), 44100))
    assert started[0].returncode is not None  # and is waited for, or Windows keeps its file
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before


def test_nothing_is_left_where_no_frame_came(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 16):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    writer = VideoWriter(path, 16)
    writer.write(clip(2))
    assert path.read_bytes() == b"old"
    writer.close()
    writer.close()
    assert len(read(path)[1]) == 2


def test_an_encoder_that_dies_is_reported_and_cleaned_up(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(VideoError, match=rf"{re.escape(str(path))}: ffmpeg stopped after \d+ frames"):  # noqa: SIM117
        with VideoWriter(path, 16) as writer:
            writer.write(clip(2))
            assert writer._encoder is not None
            writer._encoder.kill()
            writer._encoder.wait()
            writer.write(clip(9, 480, 640))
    assert os.listdir(tmp_path) == []


def test_an_ffmpeg_that_cannot_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "no ffmpeg"))
    with pytest.raises(VideoError, match=r"ffmpeg cannot be started .*: reinstall imageio-ffmpeg"):
        VideoWriter(tmp_path / "a.mp4", 16).write(clip(1))


def test_the_encoder_is_out_of_reach_of_ctrl_c(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 16)
    writer.write(clip(1))
    assert isinstance(writer._encoder, subprocess.Popen)
    if hasattr(os, "getpgid"):
        assert os.getpgid(writer._encoder.pid) != os.getpgid(0)
    writer.close()


@pytest.mark.parametrize(
    "frames", [clip(2).float(), clip(2)[..., :2], clip(2)[0]], ids=["float", "two channels", "no time"]
)
def test_what_are_no_frames(tmp_path: Path, frames: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[T, H, W, 3\]"):
        VideoWriter(tmp_path / "a.mp4", 16).write(frames)
    assert os.listdir(tmp_path) == []


# --- places ----------------------------------------------------------------------------------------------


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.mp4"
    assert check_writable(path) == path
    assert path.parent.is_dir() and os.listdir(path.parent) == []


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: give a file name such as .*video.mp4"):
        VideoWriter(tmp_path, 16)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written .*choose another output path"):
        VideoWriter(tmp_path / "file" / "a.mp4", 16)


@pytest.mark.parametrize("name", ["a", "a.txt", "a.mp3", "a.png"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is no video file name: end it in .mp4"):
        VideoWriter(tmp_path / name, 16)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_protected_places(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Administrators may write everywhere, so the refusal of the system is played here."""
    path = tmp_path / "a.mp4"
    if what == "file":
        path.touch()
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        message = "is write-protected: choose another output path"
    else:
        monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        message = r"cannot be written \(Permission denied\): choose another output path"
    with pytest.raises(ValueError, match=message):
        check_writable(path)


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 0.0, -16.0, 1e9])
def test_a_rate_that_is_none_is_told_before_anything_is_made(tmp_path: Path, fps: float) -> None:
    for make in (VideoWriter, lambda path, fps: GrowingVideo(tmp_path / "film", path, fps)):
        with pytest.raises(ValueError, match=r"fps is .*: use a number above 0, up to 1000"):
            make(tmp_path / "a.mp4", fps)
    with pytest.raises(ValueError, match="fps is"):
        Pictures(torch.zeros(1, 8, 8, 3), fps)
    assert not list(tmp_path.iterdir())


# what ffmpeg's makers write as a fraction -> the same as a number
RATES = {"24000/1001": 24000 / 1001, "30000/1001": 30000 / 1001, "15000/1001": 15000 / 1001, "50/3": 50 / 3, "16": 16}


@pytest.mark.parametrize("rate", RATES)
def test_a_rate_is_read_as_the_fraction_that_it_is(tmp_path: Path, rate: str) -> None:
    """Of two decimals 16.67 would be a frame too many after five minutes."""
    small, made = tmp_path / "a.mkv", tmp_path / "b.mp4"
    ffmpeg("-f", "lavfi", "-i", f"testsrc=s=32x32:r={rate}:d=1", small)
    assert video_rate(small) == pytest.approx(RATES[rate], abs=1e-9)
    with VideoWriter(made, video_rate(small)) as writer:
        writer.write(clip(5))
    assert video_rate(made) == pytest.approx(RATES[rate], abs=1e-9)


def test_a_rate_that_changes_is_its_mean(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    changing = ["-vf", "select='lt(n,12)+not(mod(n,4))'", "-fps_mode", "vfr"]
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=32x32:r=24:d=2", *changing, path)
    seconds = video_seconds(path)
    assert video_rate(path) == pytest.approx(imageio_ffmpeg.count_frames_and_secs(str(path))[0] / seconds, rel=0.02)


# ffmpeg's encoder -> the kinds of file that have its sound as it was; others have it as AAC
SOUNDS = {
    "aac": (".mp4", ".mov", ".mkv"),
    "libmp3lame": (".mp4", ".mov", ".mkv"),
    "ac3": (".mp4", ".mov", ".mkv"),
    "flac": (".mp4", ".mkv"),
    "libopus": (".mp4", ".mkv"),
    "libvorbis": (".mp4", ".mov", ".mkv"),
    "pcm_s16le": (".mp4", ".mov", ".mkv"),
}


@pytest.mark.parametrize("codec", SOUNDS)
def test_sound_is_copied_where_a_file_may_have_it_so(tmp_path: Path, codec: str) -> None:
    heard = tmp_path / "heard.mkv"
    ffmpeg("-f", "lavfi", "-i", "sine=f=440:d=0.5:r=48000", "-c:a", codec, heard)
    for suffix in (".mp4", ".mov", ".mkv"):
        path = tmp_path / f"silent{suffix}"
        with VideoWriter(path, 16) as writer:
            writer.write(clip(8))
        add_sound(path, heard)
        kept = packets(path) == packets(heard)
        assert kept == (suffix in SOUNDS[codec]), suffix
        assert kept or b"Audio: aac" in ffmpeg_told(path)


def packets(path: Path) -> bytes:
    """A hash of a file's sound as it is encoded."""
    return ffmpeg("-i", path, "-map", "0:a:0", "-c", "copy", "-f", "md5", "-")


def ffmpeg(*words: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, words)]
    return subprocess.run(command, capture_output=True, check=True).stdout


def ffmpeg_told(path: Path) -> bytes:
    told = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(told, capture_output=True, check=False).stderr
