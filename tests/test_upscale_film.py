"""A video file made larger into another: rate, sound, interrupts, and what goes on after them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import pytest
import torch
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.cli.main import main
from lowvram_video.runtime.latent_watch import BadLatents
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.vae.frame_watch import BadFrames
from lowvram_video.vae.tiny import TinyVAE
from lowvram_video.video.growing_video import GrowingVideo
from lowvram_video.video.reader import read_video, video_rate, video_size
from lowvram_video.video.sound import Sound
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.upscale import film, kept_stream
from lowvram_video.wanvideo.upscale.decoder_memory import DecoderMemory
from lowvram_video.wanvideo.upscale.film import FilmPlace, UpscaleFilm
from lowvram_video.wanvideo.upscale.host_windows import HostWindows
from lowvram_video.wanvideo.upscale.kept_stream import KeptStream
from lowvram_video.wanvideo.upscale.projection import LowQualityProjection
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest
from lowvram_video.wanvideo.upscale.run import Upscaler
from lowvram_video.wanvideo.upscale.source import Pictures, VideoFile
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .faults.kept_upscaling import KEY, KeptUpscaling
from .tiny_flashvsr import save_flashvsr, small_video

REQUEST = UpscaleRequest(seed=1, sparse_ratio=0.1, local_range=1, kept_windows=2)
NUM_FRAMES, RATE = 60, 24000 / 1001


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> UpscaleFiles:
    return save_flashvsr(tmp_path_factory.mktemp("flashvsr"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.mp4"
    hum = torch.sin(torch.arange(int(44100 * NUM_FRAMES / RATE)) / 20)
    with VideoWriter(path, RATE, sound=Sound(hum[None], 44100)) as writer:
        writer.write(small_video(NUM_FRAMES, 64, 64))
    return path


class Stopped(BaseException):
    pass


def upscaled(files: UpscaleFiles, video: Path, place: FilmPlace, stop_after: int | None = None) -> UpscaleFilm:
    """`stop_after` so many blocks of the network."""
    left = [stop_after]

    def between() -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

    made = UpscaleFilm(Upscaler(files, RunSettings(), between_blocks=between), VideoFile(video), REQUEST)
    made.make(place)
    return made


def frames_of(path: Path) -> Tensor:
    return read_video(path, *video_size(path), RATE)


def has_sound(path: Path) -> bool:
    told = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, check=False)
    return b"Audio:" in told.stderr


@pytest.fixture(scope="module")
def uninterrupted(files: UpscaleFiles, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "large.mp4"
    assert upscaled(files, video, FilmPlace(path)).num_frames == NUM_FRAMES
    return path


def test_rate_sound_and_number_of_frames_are_kept(uninterrupted: Path, video: Path) -> None:
    assert video_size(uninterrupted) == (128, 128)
    assert video_rate(uninterrupted) == video_rate(video) == RATE
    assert has_sound(video) and has_sound(uninterrupted)
    assert len(frames_of(uninterrupted)) == NUM_FRAMES


STAGES = (
    (LowQualityProjection, "forward", 8),  # of the second step's frames
    (TinyVAE, "frames_of", 13),  # of the fourth step's second latent frame, in the middle of the first section
    (GrowingVideo, "add", 1),  # a section is made and not encoded
    (GrowingVideo, "finish", 0),
    (film, "add_sound", 0),
)


@pytest.mark.parametrize(("owner", "name", "number"), STAGES, ids=[name for _, name, _ in STAGES])
def test_interrupted_at_any_stage_it_goes_on(
    files: UpscaleFiles,
    video: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    number: int,
) -> None:
    place, real, calls = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs"), getattr(owner, name), []

    def stopping(*args: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == number + 1:
            raise Stopped
        return real(*args, **named)

    monkeypatch.setattr(owner, name, stopping)
    with pytest.raises(Stopped):
        upscaled(files, video, place)
    num_passes = count_passes(monkeypatch)
    assert upscaled(files, video, place).num_frames == NUM_FRAMES
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted)) and has_sound(place.output)
    assert not (tmp_path / "runs").exists()
    if name == "add_sound":  # the pictures were whole
        assert not num_passes


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    passes: list[None] = []
    real = WanModel.forward

    def counted(*args: Any, **named: Any) -> Tensor:
        passes.append(None)
        return real(*args, **named)

    monkeypatch.setattr(WanModel, "forward", counted)
    return passes


@pytest.mark.parametrize("stop_after", [1, 5, 9])  # in the first window, in the first section, in the second
def test_interrupted_and_resumed_is_uninterrupted(
    files: UpscaleFiles, video: Path, uninterrupted: Path, tmp_path: Path, stop_after: int
) -> None:
    place = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs")
    with pytest.raises(Stopped):
        upscaled(files, video, place, stop_after)
    assert list((tmp_path / "runs").glob("*/state_*")) or stop_after == 1
    assert place.output.exists() == (stop_after == 9)  # a section is in it, and plays
    upscaled(files, video, place)
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted))
    assert has_sound(place.output)
    assert not (tmp_path / "runs").exists()


def test_a_killed_run_makes_again_what_it_had_not_kept(
    files: UpscaleFiles, video: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs")
    with monkeypatch.context() as killed:
        killed.setattr(film._Making, "_save", lambda self: None)
        with pytest.raises(Stopped):
            upscaled(files, video, place, 9)
    upscaled(files, video, place)
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted))


def test_what_is_kept_is_saved_from_time_to_time_and_damage_is_found(
    files: UpscaleFiles,
    video: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(KeptStream, "is_due", lambda self, stream: True)
    place = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs")
    with pytest.raises(Stopped):
        upscaled(files, video, place, 9)
    states = list((tmp_path / "runs").glob("*/state_*"))
    assert len(states) == 1
    layer = states[0] / "layer_001.safetensors"
    data = bytearray(layer.read_bytes())
    data[-5] ^= 1
    layer.write_bytes(bytes(data))
    upscaled(files, video, place)
    assert "is damaged" in caplog.text and "begun anew" in caplog.text
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted))


def test_a_full_disk_keeps_no_half_of_what_is_kept(
    files: UpscaleFiles, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_stream, "write_file", full)
    with pytest.raises(Stopped):
        upscaled(files, video, FilmPlace(tmp_path / "large.mp4", tmp_path / "runs"), 9)
    assert "the run cannot be kept" in caplog.text
    assert not list((tmp_path / "runs").glob("*/state_*"))


def test_a_state_is_written_the_less_often_the_larger_it_is(
    files: UpscaleFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(kept_stream, "time", SimpleNamespace(monotonic=lambda: now[0]))
    kept = KeptStream(tmp_path, "key")
    with Upscaler(files, RunSettings()).opened(REQUEST, (64, 64)) as stream:
        stream.step(list(small_video(25, 64, 64)))
        size = stream.windows.size.kept_bytes + sum(tensor.nbytes for tensor in stream.tensors().values())
        wait = size / kept_stream.BYTES_PER_SECOND
        assert 27 * 2**30 / kept_stream.BYTES_PER_SECOND > 1500  # half an hour for 27 GB
        for later, due in ((0.9, False), (0.2, True)):
            now[0] += later * wait
            assert kept.is_due(stream) == due

        def slow(*_: object) -> None:
            now[0] += 10

        monkeypatch.setattr(kept_stream, "write_file", slow)
        kept.save(stream, None)  # three files, 30 s: no more than a twentieth of the time is spent so
        for later, due in ((590, False), (20, True)):
            now[0] += later
            assert kept.is_due(stream) == due
        written = list(tmp_path.iterdir())
        kept.save(stream, None)  # as an interrupt at once may want it
        assert list(tmp_path.iterdir()) == written and now[0] == pytest.approx(100 + 1.1 * wait + 30 + 610)


def test_a_disk_without_room_for_what_is_kept_is_told_before_and_nothing_written(
    files: UpscaleFiles, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used(0, 0, 1000))
    begun: list[str] = []
    monkeypatch.setattr(kept_stream, "write_file", lambda path, data: begun.append(path))
    said = r"the run cannot be kept in .* \(it takes [\d.]+ .iB, and 1.0 KiB of the disk are free: free some of it, or"
    with pytest.raises(Stopped):
        upscaled(files, video, FilmPlace(tmp_path / "large.mp4", tmp_path / "runs"), 9)
    assert len(re.findall(said, caplog.text)) >= 2 and not begun  # before the first frame, and as it stopped
    assert not list((tmp_path / "runs").glob("*/state_*"))


def test_an_interrupt_while_frames_are_passed_over_loses_nothing(
    files: UpscaleFiles, video: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs")
    with pytest.raises(Stopped):
        upscaled(files, video, place, 9)
    states = list((tmp_path / "runs").glob("*/state_*"))
    place.output.unlink()  # what was made by then plays after this stop too
    read: list[int] = []
    real = VideoFile.frames

    def counted(self: VideoFile) -> Iterator[Tensor]:
        for piece in real(self):
            read.append(len(piece))
            yield piece

    monkeypatch.setattr(VideoFile, "frames", counted)
    with pytest.raises(Stopped):
        upscaled(files, video, place, 20)
    assert 0 < sum(read) <= 28  # it stops at the next frame, not when all are passed over
    assert list((tmp_path / "runs").glob("*/state_*")) == states and place.output.exists()
    read.clear()
    num_passes = count_passes(monkeypatch)
    upscaled(files, video, place)
    assert len(num_passes) == 2 and torch.equal(frames_of(place.output), frames_of(uninterrupted))


def test_a_step_that_is_half_noted_is_not_kept(
    files: UpscaleFiles, video: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, commits = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs"), []
    real = HostWindows.commit

    def stopped(self: HostWindows) -> None:
        real(self)
        commits.append(None)
        if len(commits) == 2:
            raise Stopped  # as a second Ctrl-C may

    with monkeypatch.context() as patched:
        patched.setattr(HostWindows, "commit", stopped)
        with pytest.raises(Stopped):
            upscaled(files, video, place)
    upscaled(files, video, place)
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted))


def test_a_network_that_makes_no_numbers_is_told_and_no_black_video_made(
    files: UpscaleFiles, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, real = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs"), WanModel.forward
    monkeypatch.setattr(WanModel, "forward", lambda *args, **named: real(*args, **named) * float("nan"))
    with pytest.raises(BadLatents, match=r"NaN or infinite numbers .* likely damaged weights in"):
        upscaled(files, video, place)
    assert not place.output.exists()


def test_a_decoder_that_makes_no_numbers_is_told_and_no_black_video_made(
    files: UpscaleFiles, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in all of a step's pictures."""
    place, real, memories = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs"), TinyVAE.frames_of, []

    def spoiled(self: TinyVAE, latent: Tensor, memory: DecoderMemory) -> Tensor:
        memories.append(memory)
        frames = real(self, latent, memory).clone()
        frames[0, 1, -1, 3, 5] = float("nan") if len(memories) == 2 else 0.5
        return frames

    monkeypatch.setattr(TinyVAE, "frames_of", spoiled)
    monkeypatch.setattr(DecoderMemory, "commit", lambda self: pytest.fail("it remembers what it saw"))
    with pytest.raises(BadFrames, match=r"NaN or infinite numbers: likely damaged weights .*TCDecoder"):
        upscaled(files, video, place)
    assert not place.output.exists()


class SickLater(Sdpa):
    """An attention kernel that overflows from the network's fifth pass on: a section is in the film by then."""

    name = "sick"

    def __init__(self, passes: list[str]) -> None:
        super().__init__(torch.device("cpu"))
        self._passes = passes

    def attend(self, *args: Any, **named: Any) -> Tensor:
        return super().attend(*args, **named) * (float("inf") if len(self._passes) > 4 else 1)


def upscaled_sick(files: UpscaleFiles, video: Path, place: FilmPlace, stop_at: int = 0) -> list[str]:
    """The attention of each pass; it is stopped before that many are done."""
    passes: list[str] = []
    upscaler = Upscaler(files, RunSettings())
    network, made = upscaler.model.model, UpscaleFilm(upscaler, VideoFile(video), REQUEST)

    def count(*_: object) -> None:
        passes.append(network.execution.attention.name)
        if len(passes) == stop_at:
            raise Stopped

    network.execution = replace(network.execution, attention=SickLater(passes))
    network.register_forward_pre_hook(count)
    assert made.is_own(place, place.output) == place.output.exists()
    try:
        made.make(place)
    finally:
        assert network.execution.attention.name == "sick", "the next video begins as its settings say"
    return passes


@pytest.mark.slow  # the next one is of a shorter run
def test_a_kernel_that_makes_no_numbers_costs_time_alone(
    files: UpscaleFiles, video: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    place = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs")
    assert upscaled_sick(files, video, place) == ["sick"] * 5 + ["sdpa"] * 6
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted)) and has_sound(place.output)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stop_at", [7, pytest.param(11, marks=pytest.mark.slow)])  # nothing new is shown, and some
def test_a_stopped_run_on_the_safe_path_goes_on_there(
    files: UpscaleFiles,
    video: Path,
    uninterrupted: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    stop_at: int,
) -> None:
    place = FilmPlace(tmp_path / "large.mp4", tmp_path / "runs")
    with pytest.raises(Stopped):
        upscaled_sick(files, video, place, stop_at)
    assert "the attention backend sick" in caplog.text and "begins anew with exact attention" in caplog.text
    assert place.output.exists()
    passes = upscaled_sick(files, video, place)
    assert passes == ["sdpa"] * (12 - stop_at), "nothing that was sound is made again"
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("crf", [-1, 52])
def test_a_quality_that_there_is_not_is_told_at_once(tmp_path: Path, crf: int) -> None:
    with pytest.raises(ValueError, match=f"crf is {crf}; expected 0 to 51"):
        FilmPlace(tmp_path / "large.mp4", crf=crf)


MADE = {
    # ffmpeg's arguments behind the small video -> size of what is made of it, how long it is
    "pixels that are no squares": (["-vf", "setsar=4/3"], (170, 128), NUM_FRAMES / RATE),
    "turned": (["-vf", "transpose=1,setsar=3/2"], (192, 128), NUM_FRAMES / RATE),
    "rate that changes": (
        ["-vf", "select='lt(n,12)+not(mod(n,4))'", "-fps_mode", "vfr"],
        (128, 128),
        NUM_FRAMES / RATE,
    ),
    "odd sides, one frame": (["-vf", "format=yuv444p,crop=35:27:exact=1", "-frames:v", "1", "-an"], (70, 54), 1 / RATE),
    "nine frames without sound": (["-frames:v", "9", "-an"], (128, 128), 9 / RATE),
}


@pytest.mark.parametrize("name", MADE)
def test_videos_of_all_kinds_keep_their_look(files: UpscaleFiles, video: Path, tmp_path: Path, name: str) -> None:
    how, size, seconds = MADE[name]
    small, place = tmp_path / "small.mp4", FilmPlace(tmp_path / "large.mp4")
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), *how, str(small)], check=True)
    made = upscaled(files, small, place)
    assert video_size(place.output) == size
    assert video_rate(place.output) == pytest.approx(video_rate(small))
    assert made.num_frames == len(frames_of(place.output)) or name == "rate that changes"
    assert made.num_frames / video_rate(small) == pytest.approx(seconds, abs=0.2)
    assert has_sound(place.output) == has_sound(small)


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="Windows has no sessions")
def test_ctrl_c_of_the_terminal_does_not_end_the_reading(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a block to end, and what reads frames meanwhile is the terminal's, too, unless told otherwise."""
    sessions, real = [], subprocess.Popen

    def noted(*args: Any, **named: Any) -> Any:
        process = real(*args, **named)
        sessions.append(os.getsid(process.pid))
        return process

    monkeypatch.setattr(subprocess, "Popen", noted)
    assert next(VideoFile(video).frames()).shape[0]
    assert len(sessions) >= 2 and os.getsid(0) not in sessions


def test_pictures_are_made_larger_too(files: UpscaleFiles, tmp_path: Path) -> None:
    pictures = small_video(22, 64, 64).float() / 255
    source = Pictures(pictures, 16, Sound(torch.zeros(2, 4410), 44100))
    made = UpscaleFilm(Upscaler(files, RunSettings()), source, REQUEST)
    made.make(FilmPlace(tmp_path / "large.mp4"))
    assert made.num_frames == 22 and has_sound(tmp_path / "large.mp4")
    with pytest.raises(ValueError, match=r"expected \[frames, height, width, 3\]"):
        Pictures(pictures[0], 16)


def test_another_request_is_another_run(files: UpscaleFiles, video: Path, tmp_path: Path) -> None:
    upscaler, place = Upscaler(files, RunSettings()), FilmPlace(tmp_path / "a.mp4", tmp_path)
    keys = {
        UpscaleFilm(upscaler, VideoFile(video), replace(REQUEST, **change)).key(place)  # type: ignore[arg-type]
        for change in ({}, {"seed": 2}, {"colour": "none"}, {"version": "1"}, {"sparse_ratio": 0.2})
    }
    assert len(keys) == 5


def test_the_command(
    files: UpscaleFiles, video: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report = tmp_path / "large.mp4", tmp_path / "report.json"
    command = [
        "upscale", str(video), "--model", str(files.model), "-o", str(output), "--seed", "1", "--sparse-ratio", "0.1",
        "--local-range", "9", "--kept-windows", "2", "--device", "cpu", "--report", str(report),
    ]  # fmt: skip
    assert main(command) == 0
    assert f"{output}: {NUM_FRAMES} frames" in capsys.readouterr().out
    assert report.exists() and len(frames_of(output)) == NUM_FRAMES
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:4], "-o", str(video), "--overwrite", "--device", "cpu"]) == 2
    assert "is the video itself" in capsys.readouterr().err
    other = tmp_path / "other.mp4"
    os.link(video, other)
    assert main([*command[:4], "-o", str(other), "--overwrite", "--device", "cpu"]) == 2
    assert "is the video itself" in capsys.readouterr().err
    missing = tmp_path / "none.mp4"
    assert main(["upscale", str(missing), "--model", str(files.model)]) == 2
    assert "there is no such video" in capsys.readouterr().err
    assert main(["upscale", str(video), "--model", str(tmp_path / "gone.safetensors")]) == 2
    assert "gone.safetensors: no such file" in capsys.readouterr().err
    for flags in (["--step-cache", "teacache"], ["--sparse", "1.5"]):  # of many steps; its own is --sparse-ratio
        with pytest.raises(SystemExit):
            main([*command, *flags])
        assert f"unrecognized arguments: {' '.join(flags)}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["upscale", "--help"])
    assert "keeps what was made until the video is whole (upscale, beside --output)" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("how", ["overwritten", pytest.param("deleted", marks=pytest.mark.slow)])
def test_a_video_that_changes_while_it_is_read_is_told_and_nothing_of_it_kept(
    files: UpscaleFiles, video: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Frames that were read after the change are in no state and no section that a later run goes on from."""
    small, place, data = (
        tmp_path / "small.mp4",
        FilmPlace(tmp_path / "large.mp4", tmp_path / "runs"),
        video.read_bytes(),
    )
    small.write_bytes(data)
    passes, real = [], WanModel.forward

    def changing(*args: Any, **named: Any) -> Tensor:
        passes.append(None)
        if len(passes) == 5:  # in the second section
            if how == "deleted":
                small.unlink()
            else:
                small.write_bytes(data[: len(data) // 2])
        return real(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(WanModel, "forward", changing)
        with pytest.raises(ValueError, match=r"small\.mp4 was (deleted|changed) while it was read"):
            upscaled(files, small, place)
    assert place.output.exists() and not list((tmp_path / "runs").glob("*/state_00000005"))
    small.write_bytes(data)
    upscaled(files, small, place)
    assert torch.equal(frames_of(place.output), frames_of(uninterrupted)) and has_sound(place.output)


EDITS = {  # what a state says of itself -> how it is refused
    '{"num_steps": 3, "windows": [2, 5]}': "are no use here",
    '{"num_steps": 3, "windows": [0, 99]}': "not those of",
    '{"num_steps": -1, "windows": [0, 1]}': "not those of",
    '{"num_steps": 9000000000000000000, "windows": [0, 9000000000000000002]}': "not those of",
    '{"num_steps": "3", "windows": [3, 5]}': "no whole numbers",
    '{"num_steps": 3, "windows": [3.0, 5]}': "no whole numbers",
    '{"num_steps": 2, "windows": [2, 4]}': "is of another layer or step",
    "[" * 4000: "nested",
}


def test_an_edited_state_is_never_gone_on_from(files: UpscaleFiles, tmp_path: Path) -> None:
    kept = KeptUpscaling(files, tmp_path)
    (state,) = (tmp_path / "kept").glob("state_*")
    (earlier,) = (tmp_path / "earlier").glob("state_*")
    stored, layer = state / "stream.safetensors", state / "layer_001.safetensors"
    sound = {path: path.read_bytes() for path in (stored, layer)}
    tensors = load_file(stored)
    with safe_open(stored, "pt") as file:
        metadata = file.metadata()
    changes = (
        {name: tensor.reshape(-1) if name.startswith("memory") else tensor for name, tensor in tensors.items()},
        {name: tensor.view(torch.int32) if tensor.element_size() == 4 else tensor for name, tensor in tensors.items()},
        dict(zip(tensors, list(tensors.values())[::-1], strict=True)),
    )
    with torch.inference_mode(), kept.opened() as stream:
        kept.check(stream, tmp_path / "kept")

        def refused(said: str) -> None:
            stream.begin_anew()
            with pytest.raises(ValueError, match=re.escape(said)):
                kept.check(stream, tmp_path / "kept")
            for path, data in sound.items():
                path.write_bytes(data)

        for text, said in EDITS.items():
            kept_stream.write_signed(stored, tensors, {"key": KEY, "said": text})
            refused(said)
        for changed in changes:
            save_file(changed, stored, metadata)
            refused("is damaged")
        for other in (earlier / layer.name, state / "layer_000.safetensors"):
            layer.write_bytes(other.read_bytes())
            refused("is of another layer or step")
