"""Nothing that is there is ever replaced unasked, and what killed runs leave is cleaned."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.cli.main import main, make_parser
from lowvram_video.cli.output import OutputFile, numbered
from lowvram_video.system import atomic_files
from lowvram_video.system.atomic_files import write_file
from lowvram_video.system.output_lock import OutputLock
from lowvram_video.system.scratch_folders import PREFIX, scratch_folder
from lowvram_video.video.growing_video import GrowingVideo
from lowvram_video.video.writer import VideoWriter
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from PIL import Image

from .test_cli import arguments, num_frames, refusal
from .tiny import save_files, save_wan

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to kill is a fork")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("files"))


def test_a_file_that_is_there_is_refused_and_kept(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.mp4"
    output.write_bytes(b"precious")
    for words in (arguments(files, output), ["demo", "-o", str(output)]):
        assert f"{output} exists already: choose another name, or give --overwrite" in refusal(capsys, words)
    assert output.read_bytes() == b"precious" and os.listdir(tmp_path) == ["a.mp4"]
    assert main(arguments(files, output, "--overwrite")) == 0
    assert num_frames(output) == 5
    assert "exists already" in refusal(capsys, arguments(files, output)), "a whole video is no unfinished one"


def test_a_default_name_is_numbered(files: WanFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = arguments(files, tmp_path)
    place = words.index("--output")
    del words[place : place + 2]
    for seed in range(3):
        assert main([*words, "--seed", str(seed)]) == 0
    assert sorted(os.listdir("output")) == ["video.mp4", "video_2.mp4", "video_3.mp4"]
    made = {path.read_bytes() for path in Path("output").iterdir()}
    assert len(made) == 3
    assert main([*words, "--overwrite", "--seed", "2"]) == 0
    assert Path("output/video.mp4").read_bytes() == Path("output/video_3.mp4").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_replaces_the_frames_that_it_left(
    files: WanFiles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    output, decode = tmp_path / "a.mp4", WanPipeline._decode

    def stopped(self, *arguments):  # type: ignore[no-untyped-def]
        yield next(decode(self, *arguments))
        raise error

    monkeypatch.setattr(WanPipeline, "_decode", stopped)
    assert main(arguments(files, output)) != 0
    assert num_frames(output) == 1
    monkeypatch.undo()
    assert "exists already" in refusal(capsys, arguments(files, output, "--seed", 9)), "of another run"
    assert main(arguments(files, output)) == 0
    assert num_frames(output) == 5 and os.listdir(tmp_path) == ["a.mp4"]


def test_a_growing_video_knows_its_own_wherever_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the moment when the video is in its place and the one when film.json says so."""
    folder, path = tmp_path / "film", tmp_path / "a.mp4"
    commit = GrowingVideo._commit

    def killed(self: GrowingVideo, state: object) -> None:
        raise KeyboardInterrupt

    film = GrowingVideo(folder, path)
    film.add(torch.zeros(6, 16, 16, 3, dtype=torch.uint8), 0)
    assert GrowingVideo.is_at(folder, path)
    monkeypatch.setattr(GrowingVideo, "_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        film.add(torch.full((6, 16, 16, 3), 99, dtype=torch.uint8), 0)
    monkeypatch.setattr(GrowingVideo, "_commit", commit)
    assert num_frames(path) == 12 and GrowingVideo.is_at(folder, path)
    path.write_bytes(b"another video")
    assert not GrowingVideo.is_at(folder, path)


def test_a_report_replaces_nothing_but_a_report(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, report = save_wan(tmp_path / "model.safetensors"), tmp_path / "report.json"
    before = model.read_bytes()
    line = refusal(capsys, arguments(files, tmp_path / "a.mp4", "--report", model))
    assert f"{model} is no report, and is not replaced by one" in line and model.read_bytes() == before
    report.write_text(json.dumps({"mine": 1}))
    assert "is no report" in refusal(capsys, arguments(files, tmp_path / "a.mp4", "--report", report))
    report.unlink()
    (tmp_path / "report.png").write_bytes(b"a holiday")
    assert "is there without a report" in refusal(capsys, arguments(files, tmp_path / "a.mp4", "--report", report))
    (tmp_path / "report.png").unlink()
    assert "end the report's in .json" in refusal(
        capsys, arguments(files, tmp_path / "a.mp4", "--report", tmp_path / "r.png")
    )
    for number in range(2):
        assert main(arguments(files, tmp_path / f"{number}.mp4", "--report", report)) == 0


NOT_REPLACED = (
    (["bench", "--device", "cpu", "-o"], "model.safetensors", "is no profile, and is not replaced by one"),
    (["bench", "--device", "cpu", "-o"], "card.json", "is no profile, and is not replaced by one"),
    (["bench", "--device", "cpu", "-o"], "card.png", "is there without a profile"),
    (["doctor", "--device", "cpu", "--report"], "model.safetensors", "is no report of doctor's, and is not replaced"),
    (["calibrate", "-o"], "model.safetensors", "is no table of a step cache, and is not replaced by one"),
    (["calibrate"], "own.step_cache.json", "is no table of a step cache, and is not replaced by one"),
    (["demo", "-o"], "a.png", "a.png exists already: choose another name, or give --overwrite"),
)


@pytest.mark.parametrize(("words", "name", "expected"), NOT_REPLACED)
def test_no_command_replaces_what_it_did_not_make(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], name: str, expected: str
) -> None:
    there = tmp_path / name
    there.write_bytes(b'{"precious": 1}')
    if words[0] == "calibrate":
        model = save_wan(tmp_path / "own.safetensors")
        own = ["--model", model, "--text-encoder", files.text_encoder, "--vae", files.vae, "--device", "cpu"]
        words = [words[0], *map(str, own), *words[1:]]
    target = there.with_suffix(".json" if words[0] == "bench" else ".mp4") if there.suffix == ".png" else there
    line = refusal(capsys, [*words, str(target)] if words[-1] in ("-o", "--report") else words)
    assert f"{there}" in line and expected in line
    assert there.read_bytes() == b'{"precious": 1}'


def test_a_default_name_leaves_a_picture_beside_it(tmp_path: Path) -> None:
    (tmp_path / "demo.png").write_bytes(b"precious")
    with OutputFile(None, tmp_path / "demo.mp4", beside=".png") as output:
        assert output.pick() == tmp_path / "demo_2.mp4"


@pytest.mark.parametrize("how", ["the same name", "a link", "a hard link"])
def test_what_is_read_is_not_written_over(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    read = tmp_path / "output" / "video.mp4"
    read.parent.mkdir()
    Image.new("RGB", (64, 48)).save(read, "PNG")
    before = read.read_bytes()
    other = read if how == "the same name" else tmp_path / "other.mp4"
    if how == "a link":
        other.symlink_to(read)
    elif how == "a hard link":
        os.link(read, other)
    said = "is the file of --image too, which is needed until the end"
    model = save_wan(tmp_path / "model.safetensors", "i2v")
    assert said in refusal(capsys, arguments(replace(files, model=model), other, "--image", read, "--overwrite"))
    monkeypatch.chdir(tmp_path)
    options = make_parser().parse_args(["generate", "--model", "m", "--prompt", "p", "--image", str(read)])
    default = Path("output/video.mp4")
    OutputFile(None, default).check_sources(options)  # another name is found
    with pytest.raises(ValueError, match=said):
        OutputFile(None, default, overwrite=True).check_sources(options)
    assert read.read_bytes() == before


# --- two at once -----------------------------------------------------------------------------------------


def hold(path: Path, ready: Any, over: Any) -> None:
    lock = OutputLock(path)
    ready.set()
    over.wait()
    lock.release()


@pytest.mark.parametrize("given", [True, False])
def test_two_processes_never_write_one_file(tmp_path: Path, given: bool) -> None:
    path, ready, over = tmp_path / "video.mp4", multiprocessing.Event(), multiprocessing.Event()
    other = multiprocessing.Process(target=hold, args=(path, ready, over))
    other.start()
    try:
        assert ready.wait(30)
        if given:
            with (
                OutputFile(path, path, overwrite=True) as output,
                pytest.raises(ValueError, match=r"video.mp4 is being written \(process \d+ since .*another name"),
            ):
                output.pick()
        else:
            with OutputFile(None, path) as output:
                assert output.pick().name == "video_2.mp4"
    finally:
        over.set()
        other.join()
    with OutputFile(path, path) as output:
        assert output.pick() == path
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_a_link_is_one_output_whatever_it_leads_to(tmp_path: Path) -> None:
    """A growing video replaces the link: a second run of that name would find another file, and remove the parts."""
    (tmp_path / "elsewhere").mkdir()
    path, target, folder = tmp_path / "a.mp4", tmp_path / "elsewhere" / "b.mp4", tmp_path / "link"
    target.write_bytes(b"precious")
    try:
        path.symlink_to(target)
        folder.symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("no links here")
    mine = OutputLock(path)
    partial = atomic_files.partial_name(path, ".mp4")
    partial.write_bytes(b"a run of hours")
    atomic_files.replace_file(partial, path)  # its first publication
    partial.write_bytes(b"its next one")
    for name in (path, folder / "a.mp4"):
        with pytest.raises(ValueError, match="is being written"):
            OutputLock(name)
    assert partial.read_bytes() == b"its next one" and target.read_bytes() == b"precious"
    mine.release()


def test_writers_of_one_name_do_not_share_a_file(tmp_path: Path) -> None:
    partials = {VideoWriter(tmp_path / "a.mp4", 8).partial for _ in range(3)}
    assert len(partials) == 3 and all(partial.suffix == ".mp4" for partial in partials)


def test_a_partial_file_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "00112233")
    victim, path = tmp_path / "victim", tmp_path / "a.json"
    victim.write_bytes(b"precious")
    atomic_files.partial_name(path).symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_file(path, b"new")
    assert victim.read_bytes() == b"precious"


# --- what is left behind ---------------------------------------------------------------------------------


def test_parts_of_a_killed_run_go_when_the_file_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    left = [atomic_files.partial_name(path, ".mp4"), atomic_files.partial_name(path)]
    others = [tmp_path / name for name in ("a.partial.mp4", "ab.00112233.partial.mp4", "a.mp4", "a.b.partial.mp4")]
    for file in left + others:
        file.touch()
    OutputLock(path).release()
    assert sorted(tmp_path.iterdir()) == sorted(others)


@needs_fork
def test_a_folder_of_a_killed_process_goes_at_the_next_start(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with scratch_folder(tmp_path) as folder:
            (folder / "pixels").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.glob(f"{PREFIX}*")
    os.utime(left, (time.time() - 100,) * 2)
    with scratch_folder(tmp_path) as mine, scratch_folder(tmp_path) as other:
        os.utime(mine, (time.time() - 100,) * 2)
        assert sorted(tmp_path.iterdir()) == sorted([mine, other])
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_pytorch_loads_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path])
    found = subprocess.run(
        [sys.executable, "-m", "lowvram_video.cli", "demo"],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (130, "lowvram-video: interrupted\n")


def test_numbers_follow_the_name() -> None:
    names = [path.name for path, _ in zip(numbered(Path("b/a.mp4")), range(3), strict=False)]
    assert names == ["a.mp4", "a_2.mp4", "a_3.mp4"]
