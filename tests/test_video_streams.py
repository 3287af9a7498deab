"""What video files have beside H.264 pictures: tags of any length, other codecs, sound; and what discarding leaves."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from lowvram_video.video import codecs
from lowvram_video.video.codecs import AV1, CODECS, H264, HEVC, Codec, available_codecs
from lowvram_video.video.growing_video import GrowingVideo
from lowvram_video.video.sound import Sound
from lowvram_video.video.writer import VideoError, VideoWriter

from .test_video import clip, read

WORKFLOW = json.dumps({"nodes": [{"text": "a = b; # \\ [x]\n\"ü\" 日本 'q'\r\t", "widgets": [1, None, 0.5]}]})
AWKWARD = {"workflow": WORKFLOW, "prompt": 'ü日本 = ; # \\ \n\n"', "a=b;#": "=", "empty": ""}
NO_LENGTH = {"workflow": json.dumps(["x = ; # \\ \n" * 8] * 20000)}  # 2.6 MB


def tags_of(path: Path) -> dict[str, str]:
    """What ffmpeg reads of a file's tags, but for those that it writes itself."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    command = [program, "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
    lines = re.findall(r"(?:[^\\\n]|\\.|\\\n)+", text, re.DOTALL)
    pairs = [re.split(r"(?<!\\)=", line, maxsplit=1) for line in lines if not line.startswith(";")]
    plain = [[re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in pair] for pair in pairs]
    tags = {name: value for name, value in plain}
    own = ("encoder", "major_brand", "minor_version", "compatible_brands", "ENCODER")
    return {name: value for name, value in tags.items() if name not in own}


def streams_of(path: Path) -> str:
    """What ffmpeg tells of a file's streams."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE).stderr.decode(errors="replace")


def boxes_of(path: Path) -> list[str]:
    """The names of an MP4's outermost boxes, in order."""
    data, place, names = path.read_bytes(), 0, []
    while place < len(data):
        names.append(data[place + 4 : place + 8].decode())
        place += int.from_bytes(data[place : place + 4], "big")
    return names


def tone(seconds: float, channels: int = 2, rate: int = 22050) -> Sound:
    time = torch.arange(round(seconds * rate)) / rate
    return Sound(0.5 * torch.sin(2 * torch.pi * 440 * time).expand(channels, -1), rate)


# --- tags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_tags_are_in_the_file_as_they_were_given(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    given = {name.replace("a=b;#", "a"): value for name, value in AWKWARD.items() if value}
    with VideoWriter(path, 16, tags=given) as writer:
        writer.write(clip(3))
    found = tags_of(path)
    if suffix == ".mkv":  # Matroska's names are upper case
        found = {name.lower(): value for name, value in found.items() if name != "DURATION"}
    assert found == given
    assert os.listdir(tmp_path) == [path.name]


def test_a_workflow_of_any_length_comes_before_the_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 16, tags=NO_LENGTH) as writer:
        writer.write(clip(3))
    assert tags_of(path) == NO_LENGTH
    boxes = boxes_of(path)
    assert boxes.index("moov") < boxes.index("mdat")
    assert len(read(path)[1]) == 3


def test_the_command_line_stays_short_and_says_nothing_of_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    launch = subprocess.Popen

    def watched(command: list[str], *args: object, **options: object) -> object:
        commands.append(command)
        return launch(command, *args, **options)

    monkeypatch.setattr(subprocess, "Popen", watched)
    with VideoWriter(tmp_path / "a.mp4", 16, tags={"prompt": "secret words" * 9999}, sound=tone(1)) as writer:
        writer.write(clip(3))
    assert commands and all("secret" not in word for command in commands for word in command)
    assert max(len(" ".join(command)) for command in commands) < 1500


@pytest.mark.parametrize("grows", ["front", "back"])
@pytest.mark.parametrize("tags", [AWKWARD, NO_LENGTH], ids=["awkward", "long"])
def test_a_growing_film_has_its_tags_at_every_joining(tmp_path: Path, grows: str, tags: dict[str, str]) -> None:
    path = tmp_path / "film.mp4"
    film = GrowingVideo(tmp_path / "film", path, fps=16, grows=grows, tags=tags)
    wanted = {name: value for name, value in tags.items() if value}
    for _ in range(3):
        film.add(clip(9), overlap=2)
        assert {name: value for name, value in tags_of(path).items() if value} == wanted
    film.finish()
    assert {name: value for name, value in tags_of(path).items() if value} == wanted
    assert boxes_of(path).index("moov") < boxes_of(path).index("mdat")
    assert len(read(path)[1]) == film.num_frames == 23
    assert not any("secret" in file.name or file.suffix == ".txt" for file in film.folder.iterdir())


def test_a_film_taken_up_again_has_the_tags_of_the_run_that_goes_on(tmp_path: Path) -> None:
    path, folder = tmp_path / "film.mp4", tmp_path / "film"
    first = GrowingVideo(folder, path, fps=16, tags={"workflow": "one"})
    first.add(clip(9), overlap=2)
    first.publish()
    (folder / "tags.txt").write_text("of a run that was killed")
    second = GrowingVideo(folder, path, fps=16, tags={"workflow": "two"})
    assert not (folder / "tags.txt").exists()
    second.add(clip(9), overlap=2)
    second.finish()
    assert tags_of(path) == {"workflow": "two"}


# --- codecs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.title)
def test_every_codec_holds_the_frames(tmp_path: Path, codec: Codec) -> None:
    if codec not in available_codecs():
        pytest.skip(f"this ffmpeg has no encoder of {codec.title}")
    path = tmp_path / "a.mp4"
    frames = clip(5, 64, 64)
    with VideoWriter(path, 16, codec.good_crf, codec=codec, tags={"workflow": WORKFLOW}) as writer:
        writer.write(frames)
    meta, decoded = read(path)
    assert meta["codec"] == {"H.264": "h264", "HEVC": "hevc", "AV1": "av1"}[codec.title]
    assert meta["fps"] == 16 and decoded.shape == frames.shape
    assert float((decoded.float() - frames.float()).abs().mean()) < 4
    assert tags_of(path) == {"workflow": WORKFLOW}
    if codec is HEVC:
        assert "hvc1" in streams_of(path)  # else Apple's players show nothing


@pytest.mark.parametrize(("codec", "crf"), [(H264, 52), (HEVC, -1), (AV1, 64)], ids=["H.264", "HEVC", "AV1"])
def test_a_crf_that_there_is_not(codec: Codec, crf: int) -> None:
    with pytest.raises(ValueError, match=rf"crf is {crf}; {re.escape(codec.title)} takes 0 \(best\) to"):
        codec.check(crf)


def test_a_codec_that_this_ffmpeg_lacks_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_encoders", lambda program: frozenset({"libx264", "libaom-av1"}))
    assert available_codecs() == (H264, AV1)
    assert AV1.options(30, ".mp4")[:2] == ["-c:v", "libaom-av1"]
    with pytest.raises(ValueError, match=r"has no libx265, which encodes HEVC: choose H\.264"):
        HEVC.check(20)
    H264.check(20)


def test_an_ffmpeg_that_says_nothing_is_believed_to_have_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "no ffmpeg"))
    assert available_codecs() == (H264,)


# --- sound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "layout"), [(1, "mono"), (2, "stereo"), (6, "5.1")])
def test_sound_is_heard_for_as_long_as_it_lasts(tmp_path: Path, channels: int, layout: str) -> None:
    path = tmp_path / "a.mp4"
    sound = tone(0.8, channels)
    with VideoWriter(path, 16, sound=sound.first(0.5), tags={"workflow": WORKFLOW}) as writer:
        writer.write(clip(8))
    told = streams_of(path)
    assert re.search(rf"Audio: aac.*22050 Hz, {re.escape(layout)}", told), told
    assert len(read(path)[1]) == 8
    assert tags_of(path) == {"workflow": WORKFLOW}
    decode = ["-v", "error", "-i", str(path), "-f", "f32le", "-ac", str(channels), "-"]
    heard = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *decode], check=True, stdout=subprocess.PIPE).stdout
    decoded = torch.frombuffer(bytearray(heard), dtype=torch.float32).view(-1, channels)
    assert 0.45 < len(decoded) / 22050 < 0.6
    loud = [channel for channel in range(channels) if channel != 3]  # the fourth is for bass alone
    assert float((decoded[4000:8000, loud] - sound.samples.t()[4000:8000, loud]).abs().mean()) < 0.05


def test_pictures_stay_where_the_sound_is_shorter(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16, sound=tone(0.1)) as writer:
        writer.write(clip(16))
    assert len(read(tmp_path / "a.mp4")[1]) == 16


@pytest.mark.parametrize(
    "samples", [torch.zeros(5), torch.zeros(0, 5), torch.zeros(9, 5), torch.zeros(2, 5, dtype=torch.int16)]
)
def test_what_is_no_sound(samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \[channels, samples\], floats of 1 to 8 channels"):
        Sound(samples, 44100)


# --- discarding ------------------------------------------------------------------------------------------


def test_a_discarded_video_leaves_nothing_and_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the user's")
    writer = VideoWriter(path, 16, tags={"workflow": WORKFLOW}, sound=tone(1))
    writer.write(clip(3))
    assert list(scratch.iterdir())
    writer.discard()
    writer.discard()
    writer.close()
    assert path.read_bytes() == b"the user's"
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "scratch"] and not list(scratch.iterdir())


def test_what_a_killed_process_had_ffmpeg_read_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    script = (
        "import os, sys, torch; from lowvram_video.video.writer import VideoWriter\n"
        "writer = VideoWriter(sys.argv[1], 16, tags={'prompt': 'a wish'})\n"
        "writer.write(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)); os._exit(9)"
    )
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch)}
    command = [sys.executable, "-c", script, str(tmp_path / "a.mp4")]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    (left,) = scratch.iterdir()
    assert (left / "tags").exists()
    os.utime(left, (0, 0))  # as after a minute
    with VideoWriter(tmp_path / "b.mp4", 16, tags={"workflow": WORKFLOW}) as writer:
        writer.write(clip(1))
    assert list(scratch.iterdir()) == []


def test_what_ffmpeg_reads_beside_the_frames_is_gone_when_it_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "no ffmpeg"))
    with pytest.raises(VideoError, match="ffmpeg cannot be started"):
        VideoWriter(tmp_path / "a.mp4", 16, tags={"workflow": WORKFLOW}).write(clip(1))
    assert os.listdir(tmp_path) == []


def test_no_room_for_what_ffmpeg_reads_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(VideoError, match=r"handed to ffmpeg \(No space left on device\): check the free space of"):
        VideoWriter(tmp_path / "a.mp4", 16, tags={"workflow": WORKFLOW}).write(clip(1))
    assert os.listdir(tmp_path) == []
