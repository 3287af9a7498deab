"""What reaches a terminal, a log and a folder that others read: no control characters, no prompts, no code page."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowvram_video.cli.console import PlainStream, plain_console
from lowvram_video.cli.main import main
from lowvram_video.framepack.run.folder import RunStore
from lowvram_video.system.content_key import readable
from lowvram_video.system.plain_text import printable, short, shown
from lowvram_video.system.run_lock import RunLock
from lowvram_video.video import stuck
from lowvram_video.video.reader import read_video, video_size
from lowvram_video.video.stuck import Watched
from lowvram_video.video.writer import VideoError, VideoWriter, check_writable, join_videos

ESCAPES = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp\u2066 \ud800 x\ny\r\x00 \u2028 \U000e0041"
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights")
needs_programs = pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")


def test_what_terminals_obey_is_an_escape() -> None:
    plain = printable(ESCAPES)
    assert plain.isprintable() and plain.startswith(
        "\\x1b[31mred\\x1b]0;title\\x07 \\x9b2J \\u202egnp\\u2066 \\ud800 x\\x0ay"
    )
    assert printable("日本 🐱 é Ω العربية\u3000'\"") == "日本 🐱 é Ω العربية\u3000'\""
    assert short("x" * 1000, 10) == "x" * 9 + "…" and short("x", 10) == "x"
    assert shown("\x1b") == "'\\x1b'" and len(shown(["x"] * 10**5)) < 400


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii", "utf-8"])
def test_the_code_page_decides_nothing(encoding: str) -> None:
    raw = io.BytesIO()
    stream = PlainStream(io.TextIOWrapper(raw, encoding, errors="strict", write_through=True))
    stream.write("日本 😀 é.mp4 \x1b[2J\n")
    text = raw.getvalue().decode(encoding)
    assert text.endswith(".mp4 \\x1b[2J" + os.linesep)
    assert ("😀" in text) == (encoding == "utf-8") and ("\\U0001f600" in text) == (encoding != "utf-8")


def test_the_console_is_one_of_a_program_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # pythonw
    with plain_console():
        assert sys.stderr is None


def test_errors_and_arguments_with_escapes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "\x1b[31mred.safetensors")]) == 2
    with pytest.raises(SystemExit):
        main(["inspect", "a", "\x1b[31mmore"])
    said = capsys.readouterr()
    assert "\\x1b[31mred" in said.err and "\\x1b[31mmore" in said.err and "\x1b" not in said.out + said.err


def test_every_log_of_the_package_is_plain(caplog: pytest.LogCaptureFixture) -> None:
    name = RunLock.__module__.rpartition(".")[0] + ".anything"
    with caplog.at_level(logging.INFO, logger=name):
        logging.getLogger(name).info("%s of %d", "\x1b[31mred\r", 3)
    assert caplog.messages == ["\\x1b[31mred\\x0d of 3"]


# --- what others may read --------------------------------------------------------------------------------------

SECRETS = ("a lighthouse at night", "blurred", "she waves", "one")
SETTINGS = {
    "sampling": {"sampler": "unipc", "steps": 20, "cfg": 1.0},
    "material": {
        "timed": {"base": SECRETS[0], "parts": [{"start": 0.0, "end": None, "prompt": SECRETS[2]}], "cross_fade": 0.0},
        "prompts": {SECRETS[0]: [torch.ones(2), torch.zeros(1)], SECRETS[3]: [torch.ones(2)]},
        "negative": [torch.ones(2)],
        "negative_prompt": SECRETS[1],
    },
    "model": {"file": "wan_bf16.safetensors", "loras": [["nodes", {"text that was typed": "and typed again"}]]},
}


def test_prompts_are_not_in_a_runs_folder(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, SETTINGS, 1) as store:
        store.save_section(0, torch.ones(1, 16, 1, 2, 2), torch.Generator().get_state())
        folder = store.folder
    for file in folder.iterdir():
        data = file.read_bytes()
        for secret in ("lighthouse", "blurred", "waves", '"one"', "typed"):
            assert secret.encode() not in data, file
    told = json.loads((folder / "settings.json").read_text())["settings"]
    assert told["sampling"] == SETTINGS["sampling"] and told["model"]["file"] == "wan_bf16.safetensors"


def test_the_hash_of_a_prompt_is_of_its_run() -> None:
    one, again, other = (readable({"prompt": "she waves"}, key) for key in ("a", "a", "b"))
    assert one == again != other and one["prompt"].startswith("text of 9 characters, ")


def test_folders_from_before_go_on(tmp_path: Path) -> None:
    """They have the prompt in clear until then, and the same key."""
    with RunStore.open(tmp_path, SETTINGS, 1) as store:
        store.save_section(0, torch.ones(1, 16, 1, 2, 2), torch.Generator().get_state())
        key, folder = store.key, store.folder
    older = {
        "key": key,
        "started": "then",
        "finished": "later",
        "total_sections": 1,
        "settings": {"prompt": "in clear"},
    }
    (folder / "settings.json").write_text(json.dumps(older))
    with RunStore.open(tmp_path, SETTINGS, 1) as store:
        assert store.completed == 1 and store.folder == folder
    text = (folder / "settings.json").read_text()
    assert "in clear" not in text and json.loads(text)["started"] == "then" and json.loads(text)["finished"] == "later"


# --- links -----------------------------------------------------------------------------------------------------


@needs_links
def test_locks_do_not_write_through_links(tmp_path: Path) -> None:
    victims = [tmp_path / "one", tmp_path / "two"]
    for victim, name in zip(victims, ("lock", "lock_holder.txt"), strict=True):
        victim.write_text("mine")
        (tmp_path / name).symlink_to(victim)
    lock = RunLock(tmp_path / "lock")
    assert [victim.read_text() for victim in victims] == ["mine", "mine"]
    lock.release()


@needs_links
def test_whether_a_place_can_be_written_is_asked_of_no_link(tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    for name in ("video.mp4.writable", "video.mp4.partial"):
        (tmp_path / name).symlink_to(there)
    check_writable(tmp_path / "video.mp4")
    assert not there.exists()


@needs_links
def test_joining_writes_through_no_link(tmp_path: Path) -> None:
    part, victim, other = tmp_path / "part.mp4", tmp_path / "victim", tmp_path / "other"
    with VideoWriter(part, 30, is_part=True) as writer:
        writer.write(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    victim.write_text("mine")
    other.write_text("mine")
    (tmp_path / "parts.txt").symlink_to(victim)
    (tmp_path / "film.mp4").symlink_to(other)
    join_videos([(part, 2)], tmp_path / "film.mp4", 30)
    assert victim.read_text() == other.read_text() == "mine" and not (tmp_path / "film.mp4").is_symlink()
    assert len(read_video(tmp_path / "film.mp4", 16, 16, 30)) == 2


# --- a program that hangs ------------------------------------------------------------------------------------------


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ffmpeg that takes no frame, gives none and never ends, and half a second until it is ended."""
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    monkeypatch.setattr(stuck.Watched.__init__, "__defaults__", (0.5,))


@needs_programs
def test_a_hung_encoder_is_ended(tmp_path: Path, hung: None) -> None:
    writer = VideoWriter(tmp_path / "v.mp4", 30)
    with pytest.raises(VideoError, match=r"v\.mp4.*did nothing for 0\.5 s and was ended"), writer:
        writer.write(torch.zeros(20, 256, 256, 3, dtype=torch.uint8))
    assert not (tmp_path / "v.mp4").exists()


@needs_programs
def test_a_hung_encoder_is_ended_when_it_should_finish(tmp_path: Path, hung: None) -> None:
    writer = VideoWriter(tmp_path / "v.mp4", 30)
    writer.write(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(VideoError, match=r"did nothing for 0\.5 s and was ended"):
        writer.close()


@needs_programs
def test_a_hung_decoder_is_ended(tmp_path: Path, hung: None) -> None:
    (tmp_path / "v.mp4").write_bytes(b"any")
    with pytest.raises(ValueError, match=r"v\.mp4.*did nothing for 0\.5 s and was ended"):
        read_video(tmp_path / "v.mp4", 16, 16, 30)
    with pytest.raises(ValueError, match=r"v\.mp4.*did nothing for 0\.5 s and was ended"):
        video_size(tmp_path / "v.mp4")


def test_a_program_that_ends_is_left_alone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    watched = Watched(process, 60)
    assert watched.wait() == 0 and watched.stuck == ""
