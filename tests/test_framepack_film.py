"""The growing video: which frames it has, and what is left of it after a crash at any point."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Literal

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from lowvram_video.video import growing_video as film_module
from lowvram_video.video import placed_video as placed_module
from lowvram_video.video.growing_video import GrowingVideo, cross_fade, disk_bytes
from lowvram_video.video.writer import VideoError, VideoWriter
from torch import Tensor

HEIGHT, WIDTH = 32, 48
OVERLAP = 5  # 4w - 3 with w = 2
STRIDE = int(os.environ.get("FILM_KILL_STRIDE", "7"))  # 1 kills at every step, which takes a minute
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to kill is a fork")


def section(index: int, num_frames: int) -> Tensor:
    """Moving waves, other ones in each section: no two frames are alike."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    waves = [np.sin(x / 9 + t * 0.3 + index * 1.7 + c) + np.cos(y / 7 - t * 0.2 + c * index) for c in range(3)]
    return torch.from_numpy(np.round(127.5 + 60 * np.stack(waves, axis=-1)).clip(0, 255).astype(np.uint8))


def sections(count: int) -> list[Tensor]:
    """As FramePack decodes them with w = 2: 4w - 3 frames, then 8w - 3 each, the last of base one latent more."""
    sizes = [5, *[13] * (count - 2), 17] if count > 1 else [9]
    return [section(index, size) for index, size in enumerate(sizes)]


def reference(parts: list[Tensor], grows: str, overlap: int = OVERLAP) -> np.ndarray:
    """Cross-fades in float64 numpy, rounded after each, as the video is 8 bits deep."""
    film = parts[0].numpy()
    for part in parts[1:]:
        earlier, later = (part.numpy(), film) if grows == "front" else (film, part.numpy())
        weight = np.linspace(1, 0, overlap)[:, None, None, None]
        faded = earlier[len(earlier) - overlap :] * weight + later[:overlap] * (1 - weight)
        # ties go up, and what rounding errors of float64 leave a little below a tie is a tie
        faded = np.floor(faded + 0.5 + 1e-9).astype(np.uint8)
        film = np.concatenate([earlier[: len(earlier) - overlap], faded, later[overlap:]])
    return film


def decode(path: Path) -> np.ndarray:
    frames = imageio_ffmpeg.read_frames(str(path))
    width, height = next(frames)["size"]
    return np.stack([np.frombuffer(frame, dtype=np.uint8).reshape(height, width, 3) for frame in frames])


def times(path: Path) -> tuple[float, list[int]]:
    """The length of a time unit in seconds, and when each frame is shown in such units."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    command = [program, "-v", "error", "-i", str(path), "-c", "copy", "-f", "framecrc", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    unit = next(re.search(r"(\d+)/(\d+)", line) for line in lines if line.startswith("#tb"))
    packets = [[int(field) for field in line.split(",")[1:4]] for line in lines if not line.startswith("#")]
    assert all(dts == pts for dts, pts, _ in packets)
    return int(unit[1]) / int(unit[2]), [pts for _, pts, _ in packets]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def encoded(frames: np.ndarray, path: Path, crf: int) -> np.ndarray:
    with VideoWriter(path, 30, crf) as writer:
        writer.write(torch.from_numpy(frames))
    return decode(path)


@pytest.mark.parametrize("grows", ["front", "back"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_film_is_the_blend_of_its_sections_frame_for_frame(tmp_path: Path, grows: str, count: int) -> None:
    """Quality 0 loses nothing but what yuv420p does, so a direct encode of the reference must be the same."""
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", crf=0, grows=grows)
    parts = sections(count)
    for index, part in enumerate(parts):
        film.add(part, OVERLAP)
        wanted = reference(parts[: index + 1], grows)
        assert (film.num_sections, film.num_frames) == (index + 1, len(wanted))
        assert len(decode(film.path)) == len(wanted)
    np.testing.assert_array_equal(decode(film.path), encoded(wanted, tmp_path / "direct.mp4", 0))
    assert sorted(os.listdir(tmp_path)) == ["direct.mp4", "film.mp4", "parts"]
    unit, shown = times(film.path)
    assert np.allclose(np.array(shown) * unit, np.arange(film.num_frames) / 30, atol=1e-9)
    assert imageio_ffmpeg.count_frames_and_secs(str(film.path)) == (
        film.num_frames,
        pytest.approx(film.num_frames / 30, abs=0.01),
    )


def test_quality_is_that_of_one_encode(tmp_path: Path) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", grows="front")
    parts = sections(4)
    for part in parts:
        film.add(part, OVERLAP)
    wanted = reference(parts, "front")
    lossless = encoded(wanted, tmp_path / "lossless.mp4", 0)  # so that yuv420p does not count
    found, direct = psnr(decode(film.path), lossless), psnr(encoded(wanted, tmp_path / "direct.mp4", 12), lossless)
    size = film.path.stat().st_size / (tmp_path / "direct.mp4").stat().st_size
    print(f"film {found:.1f} dB, one encode {direct:.1f} dB, {size:.2f} times its size")
    assert found > 38 and found > direct - 0.5


@pytest.mark.parametrize("fps", [30, 23.976, 16, 7])
def test_times_are_even_over_many_short_parts(tmp_path: Path, fps: float) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", fps=fps)
    for index in range(6):
        film.add(section(index, 2), 1)
    unit, shown = times(film.path)
    steps = set(np.diff(shown))
    assert len(shown) == film.num_frames == 7 and len(steps) == 1
    assert steps.pop() * unit == pytest.approx(1 / fps, rel=1e-6)


@pytest.mark.parametrize("overlap", [0, 1, 2, 5, 33])
def test_cross_fade_weights_are_linspace(overlap: int) -> None:
    generator = torch.Generator().manual_seed(overlap)
    a, b = (torch.randint(0, 256, (40, 6, 4, 3), generator=generator, dtype=torch.uint8) for _ in range(2))
    joined = cross_fade(a, b, overlap)
    np.testing.assert_array_equal(joined.numpy(), reference([a, b], "back", overlap))
    weights = torch.linspace(1, 0, overlap).view(-1, 1, 1, 1)  # the definition, in floats
    exact = weights * a[40 - overlap :].float() + (1 - weights) * b[:overlap].float()
    error = (joined[40 - overlap : 40].float() - exact).abs().max() if overlap else torch.zeros(())
    print(f"overlap {overlap}: at most {float(error):.3f} of 255 from the blend in floats")
    assert float(error) <= 0.5 + 1e-3


def test_floats_are_rounded_once_and_overlaps_may_shrink(tmp_path: Path) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", crf=0)
    a, b = section(0, 9), section(1, 7)
    film.add(a.float() / 127.5 - 1, 4)
    film.add(b.float() / 127.5 - 1, 2)
    wanted = reference([a, b], "back", 2)
    np.testing.assert_array_equal(decode(film.path), encoded(wanted, tmp_path / "direct.mp4", 0))


def test_only_the_open_frames_are_encoded_again(tmp_path: Path) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    written: dict[str, int] = {}
    for part in sections(4):
        film.add(part, OVERLAP)
        film.publish()
        files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("final_*")}
        assert written.items() <= files.items()
        written = files
    assert len(written) == 3 and len(list((tmp_path / "parts").glob("open_*"))) == 2


def test_odd_names_and_a_missing_video(tmp_path: Path) -> None:
    folder = tmp_path / "it's 100% #1? ünï"
    film = GrowingVideo(folder / "parts", folder / "a 'b'.mp4", crf=0)
    for part in sections(2):
        film.add(part, OVERLAP)
    film.publish()
    whole = decode(film.path)
    film.path.unlink()
    again = GrowingVideo(folder / "parts", folder / "a 'b'.mp4", crf=0)
    assert again.num_sections == 2
    np.testing.assert_array_equal(decode(again.path), whole)
    elsewhere = GrowingVideo(folder / "parts", folder / "c.mkv", crf=0)
    np.testing.assert_array_equal(decode(elsewhere.path), whole)


# --- interruptions ----------------------------------------------------------------------------------------


def build(folder: Path, grows: str, stop_at: int | None = None) -> None:
    """Add what is missing; at the `stop_at`-th step on the disk the process ends as if killed."""
    if stop_at is not None:
        left = [stop_at]

        def counted(call):
            def step(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return step

        # this is the process that dies: nothing else sees the change
        os.replace, os.fsync, Path.unlink = counted(os.replace), counted(os.fsync), counted(Path.unlink)
    film = GrowingVideo(folder / "parts", folder / "film.mp4", grows=grows)
    parts = sections(3)
    while film.num_sections < len(parts):
        film.add(parts[film.num_sections], OVERLAP)
    film.publish()


def check_playable(folder: Path, grows: str) -> None:
    """Whatever is there is a whole number of sections."""
    path = folder / "film.mp4"
    if path.exists():
        found = decode(path)
        lengths = {len(reference(sections(3)[:count], grows)): count for count in (1, 2, 3)}
        assert len(found) in lengths, len(found)
        assert psnr(found, reference(sections(3)[: lengths[len(found)]], grows)) > 35


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("grows", ["front", "back"])
def test_killed_at_any_step_the_film_goes_on_and_is_the_same(tmp_path: Path, grows: str) -> None:
    context = multiprocessing.get_context("fork")
    (tmp_path / "whole").mkdir()
    build(tmp_path / "whole", grows)
    whole = decode(tmp_path / "whole" / "film.mp4")
    stop_at, survived = 0 if grows == "front" else STRIDE // 2, False
    while not survived:
        folder = tmp_path / f"killed_{stop_at}"
        process = context.Process(target=build, args=(folder, grows, stop_at))
        process.start()
        process.join()
        survived = process.exitcode == 0
        assert survived or process.exitcode == -signal.SIGKILL
        check_playable(folder, grows)
        build(folder, grows)
        np.testing.assert_array_equal(decode(folder / "film.mp4"), whole)
        names = {path.suffix for path in (folder / "parts").iterdir() if path.name.startswith("open_")}
        assert names == {".mp4", ".safetensors"} and len(list((folder / "parts").glob("*"))) == 5
        assert os.listdir(folder).count("film.mp4") == 1
        stop_at += STRIDE
    print(f"{grows}: killed at {stop_at} steps")


@needs_fork
def test_killed_at_random_times(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    build(tmp_path / "whole", "back")
    clock = random.Random(5)
    for _ in range(4):
        process = context.Process(target=build, args=(tmp_path, "back"))
        process.start()
        time.sleep(clock.uniform(0.02, 0.5))
        process.kill()
        process.join()
        check_playable(tmp_path, "back")
    build(tmp_path, "back")
    np.testing.assert_array_equal(decode(tmp_path / "film.mp4"), decode(tmp_path / "whole" / "film.mp4"))


@pytest.fixture(scope="module")
def two_sections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("film")
    film = GrowingVideo(folder / "parts", folder / "film.mp4")
    for part in sections(2):
        film.add(part, OVERLAP)
    film.publish()
    return folder


@pytest.mark.parametrize("victim", ["final_*.mp4", "open_*.mp4", "open_*.safetensors", "film.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_part_means_a_new_film(
    tmp_path: Path, two_sections: Path, victim: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(two_sections, tmp_path, dirs_exist_ok=True)
    path = next((tmp_path / "parts").glob(victim))
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"{" + data[:-1])
    again = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    assert again.num_sections == again.num_frames == 0
    assert "the video is built anew" in caplog.text or (victim, damage) == ("film.json", "gone")
    assert os.listdir(tmp_path / "parts") == []


def test_other_settings_mean_a_new_film(tmp_path: Path) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", crf=12)
    film.add(section(0, 9), OVERLAP)
    film.publish()
    assert GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", crf=12).num_sections == 1
    assert GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", crf=20).num_sections == 0


def test_a_video_put_in_the_films_place_is_replaced(tmp_path: Path) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    film.add(section(0, 9), OVERLAP)
    film.path.write_bytes(b"another")
    assert len(decode(GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4").path)) == 9


# --- errors -----------------------------------------------------------------------------------------------


def test_what_does_not_fit(tmp_path: Path) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    with pytest.raises(ValueError, match=r"expected \[T, H, W, 3\]"):
        film.add(section(0, 9)[0], 0)
    film.add(section(0, 9), 3)
    with pytest.raises(ValueError, match=r"overlap the film by 4; 0 to 3 are possible"):
        film.add(section(1, 9), 4)
    with pytest.raises(ValueError, match=r"frames of 24 x 32 pixels, and the film .* has 48 x 32"):
        film.add(section(1, 9)[:, :, :24], 3)
    with pytest.raises(ValueError, match="section 1 of 2 frames is to overlap"):
        film.add(section(1, 2), 3)
    assert film.num_sections == 1 and len(decode(film.path)) == 9
    with pytest.raises(ValueError, match="grows is 'top'; a film grows at its \"front\""):
        GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", grows="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no video file name"):
        GrowingVideo(tmp_path / "parts", tmp_path / "film.txt")


def test_a_full_disk_leaves_the_film_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    parts = sections(3)
    film.add(parts[0], OVERLAP)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(VideoError, match=r"cannot be written \(No space left on device\): check the free space"):
            film.add(parts[1], OVERLAP)
    assert film.num_sections == 1 and len(decode(film.path)) == len(parts[0])
    film.add(parts[1], OVERLAP)
    film.add(parts[2], OVERLAP)
    assert len(decode(film.path)) == len(reference(parts, "back"))


def test_an_ffmpeg_that_fails_to_join_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    monkeypatch.setattr(film_module, "flush_file", lambda path: path.write_bytes(b"broken") and "")
    with pytest.raises(VideoError, match=r"film.partial.mp4: ffmpeg could not join 2 parts \(.+\): check"):
        film.add(section(0, 9), OVERLAP)
    assert os.listdir(tmp_path) == ["parts"] and film.num_sections == 0


def test_a_video_open_in_a_player_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows refuses to replace an open file; the refusal is played here."""
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    film.add(section(0, 9), OVERLAP)
    with monkeypatch.context() as patched:
        refusal = PermissionError(13, "The process cannot access the file")
        patched.setattr(placed_module, "replace_file", lambda *_: (_ for _ in ()).throw(refusal))
        film.add(section(1, 9), OVERLAP)
    assert "is open in another program: the longer video is" in caplog.text
    assert (len(decode(film.path)), len(decode(tmp_path / "film.newest.mp4"))) == (9, 13)
    film.add(section(2, 9), OVERLAP)
    assert len(decode(film.path)) == 17 and sorted(os.listdir(tmp_path)) == ["film.mp4", "parts"]


@pytest.mark.parametrize("both_open", [False, True])
def test_a_longer_video_open_in_a_player_stops_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, both_open: bool
) -> None:
    """The one that the first warning names is what people open then; Windows' refusals are played here."""
    film, newest = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4"), tmp_path / "film.newest.mp4"
    film.add(section(0, 9), OVERLAP)
    newest.write_bytes(b"in a player")
    replace, unlink = os.replace, Path.unlink
    in_use = {newest, film.path} if both_open else {newest}

    def refused(place: Path) -> None:
        if Path(place) in in_use:
            raise PermissionError(13, "The process cannot access the file")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda source, target: (refused(target), replace(source, target)))
        patched.setattr(Path, "unlink", lambda path, missing_ok=False: (refused(path), unlink(path, missing_ok)))
        film.add(section(1, 9), OVERLAP)
    assert newest.read_bytes() == b"in a player"
    longest = tmp_path / "film.partial.mp4" if both_open else film.path
    assert len(decode(longest)) == 13
    assert (f"the longer video is {longest}" in caplog.text) == both_open
    film.add(section(2, 9), OVERLAP)
    assert len(decode(film.path)) == 17 and sorted(os.listdir(tmp_path)) == ["film.mp4", "parts"]


@pytest.mark.parametrize("closed_again", [False, True])
@pytest.mark.parametrize("left", ["finish", "leave"])
def test_a_video_open_in_a_player_at_the_end_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: str, closed_again: bool
) -> None:
    """Windows' refusals are played here: the last publication finds its place taken, and so does the end."""
    folder, path = tmp_path / "parts", tmp_path / "film.mp4"
    film = GrowingVideo(folder, path)
    film.add(section(0, 9), OVERLAP)
    real, refusal = placed_module.replace_file, PermissionError(13, "The process cannot access the file")
    in_player = [True]

    def refused(source: Path, target: Path) -> None:
        if in_player[0] and target == path:
            raise refusal
        real(source, target)

    monkeypatch.setattr(placed_module, "replace_file", refused)
    film.add(section(1, 9), OVERLAP)
    in_player[0] = not closed_again
    getattr(film, left)()
    assert len(decode(film.video)) == 13
    assert (film.video == path) == closed_again
    if closed_again:
        assert sorted(os.listdir(tmp_path)) == ["film.mp4", "parts"]
        return
    assert re.fullmatch(r"film\.[0-9a-f]{8}\.mp4", film.video.name)
    assert f"the whole video is {film.video}" in caplog.text and len(decode(path)) == 9
    assert GrowingVideo.is_at(folder, path), "what the player has is this film's: the same run may replace it"

    monkeypatch.setattr(placed_module, "replace_file", real)
    other = GrowingVideo(tmp_path / "other parts", path)  # of another run, which was asked to replace it
    other.add(section(5, 9), 0)
    other.finish()
    assert len(decode(film.video)) == 13, "another run of that name leaves it alone"
    again = GrowingVideo(folder, path)
    assert len(decode(path)) == 13 and again.video == path


def test_an_interrupt_after_the_video_is_in_its_place_leaves_one_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before film.json says so; then the film is left."""
    folder, path = tmp_path / "parts", tmp_path / "film.mp4"
    film = GrowingVideo(folder, path)
    film.add(section(0, 9), OVERLAP)
    commit = GrowingVideo._commit

    def interrupted(self: GrowingVideo, state: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GrowingVideo, "_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        film.add(section(1, 9), OVERLAP)
    monkeypatch.setattr(GrowingVideo, "_commit", commit)
    assert len(decode(path)) == 13
    film.leave()
    assert GrowingVideo.is_at(folder, path) and len(decode(path)) == film.num_frames == 9


def test_a_link_in_the_place_of_a_part_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    try:
        (tmp_path / "film.partial.mp4").symlink_to(tmp_path / "victim")
    except OSError:
        pytest.skip("no links here")
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    film.add(section(0, 9), 0)
    assert (tmp_path / "victim").read_bytes() == b"precious" and len(decode(film.path)) == 9


def test_an_interrupted_joining_leaves_nothing_beside_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen, timeout: float | None = None) -> int:
        status = wait(process, timeout)
        if "concat" in process.args and not seen:
            seen.append(process)
            raise KeyboardInterrupt
        return status

    seen: list[subprocess.Popen] = []
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        film.add(section(0, 9), OVERLAP)
    film.leave()
    assert seen and os.listdir(tmp_path) == ["parts"]


def test_leaving_a_film_whose_folder_is_gone_only_tells_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What counts is the error or the interrupt that ended the run."""
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4")
    for part in sections(20):
        film.add(part, OVERLAP)
        if film.num_shown < film.num_frames:
            break
    else:
        pytest.fail("all of it is shown")
    shutil.rmtree(film.folder)
    film.folder.write_bytes(b"")
    film.leave()
    assert "cannot be written" in caplog.text


def test_the_room_a_film_takes_is_enough_for_noise(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", grows="front")
    for part in sections(3):
        noise = torch.randint(-10, 11, part.shape, generator=generator)
        film.add((part + noise).clamp(0, 255).to(torch.uint8), OVERLAP)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.*") if path.is_file())
    wanted = disk_bytes(film.num_frames, HEIGHT, WIDTH, OVERLAP)
    print(f"{taken / wanted:.2f} of the estimate")
    assert taken < wanted
    state = json.loads((tmp_path / "parts" / "film.json").read_text())
    assert state["num_sections"] == 3


# --- how often it is written ------------------------------------------------------------------------------


def written_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of every file that is moved to its place from now on, by the end of its name."""
    written: dict[str, int] = {}
    replace = os.replace

    def counted(source: Path, target: Path) -> None:
        written[Path(target).suffix] = written.get(Path(target).suffix, 0) + Path(source).stat().st_size
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    return written


def test_at_most_twelve_times_its_bytes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, frames that wait and all publications together, wherever the film ends."""
    written = written_bytes(monkeypatch)
    film, count = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", crf=4, grows="front"), 200
    generator, totals = torch.Generator().manual_seed(0), []
    for _ in range(count):
        film.add(torch.randint(0, 256, (5, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8), 1)
        totals.append(sum(written[suffix] for suffix in written if suffix != ".json"))
    film.finish()
    size, total = film.path.stat().st_size, sum(written[suffix] for suffix in written if suffix != ".json")
    # a film that ends earlier is published once more there; all sections are of one kind
    ratios = [total / size, *(1 + totals[index] * count / (size * (index + 1)) for index in range(99, count))]
    print(f"{ratios[0]:.2f} times the film's {size / 2**20:.2f} MiB, at most {max(ratios):.2f}; {written}")
    assert max(ratios) <= 12
    assert len(decode(film.path)) == film.num_frames == count * 4 + 1


def grow(folder: Path, grows: Literal["front", "back"], parts: list[Tensor], stop: int) -> GrowingVideo:
    """The film of the first `stop` sections, as the process leaves it that is killed after them."""
    film = GrowingVideo(folder / "parts", folder / "film.mp4", grows=grows)
    while film.num_sections < stop:
        film.add(parts[film.num_sections], OVERLAP)
    return film


@pytest.mark.parametrize("grows", ["front", "back"])
def test_the_video_is_published_when_a_tenth_of_it_is_new(tmp_path: Path, grows: Literal["front", "back"]) -> None:
    parts, shown = sections(24), []
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", grows=grows)
    for part in parts:
        film.add(part, OVERLAP)
        shown.append(film.num_shown)
        assert film.num_shown > 0.9 * film.num_frames
    assert 10 < len(set(shown)) < 20 and film.num_shown < film.num_frames
    published = len(decode(film.path))
    assert published == film.num_shown == len(reference(parts[: len(parts) - 1], grows))
    film.publish()
    assert len(decode(film.path)) == film.num_shown == film.num_frames == len(reference(parts, grows))
    again = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", grows=grows)
    assert again.num_sections == len(parts), "left in order: nothing has to be decoded again"


@pytest.mark.slow
@pytest.mark.parametrize("grows", ["front", "back"])
def test_killed_between_publications_only_the_last_section_comes_again(
    tmp_path: Path, grows: Literal["front", "back"]
) -> None:
    parts = sections(16)
    grow(tmp_path / "whole", grows, parts, len(parts)).finish()
    whole = decode(tmp_path / "whole" / "film.mp4")
    for stop in (1, 11, 13, 16):  # the eleventh and the thirteenth are not published
        folder = tmp_path / str(stop)
        shown = grow(folder, grows, parts, stop).num_shown
        again = GrowingVideo(folder / "parts", folder / "film.mp4", grows=grows)
        assert (again.num_sections, again.num_shown) == (stop - 1, shown) and len(decode(again.path)) == shown
        again.publish()
        assert len(decode(again.path)) == shown, "as it was found"
        grow(folder, grows, parts, len(parts)).finish()
        np.testing.assert_array_equal(decode(folder / "film.mp4"), whole)
        finished = GrowingVideo(folder / "parts", folder / "film.mp4", grows=grows)
        assert finished.num_sections == len(parts) and not list((folder / "parts").glob("*.safetensors"))


def test_a_given_beginning_is_read_again_for_its_last_frames_alone(tmp_path: Path) -> None:
    given, part = section(3, 30), section(4, 13)

    def grown(name: str, killed: bool) -> np.ndarray:
        film = GrowingVideo(tmp_path / name, tmp_path / f"{name}.mp4", crf=0)
        film.begin(given.split(7), OVERLAP)
        if killed:
            film = GrowingVideo(tmp_path / name, tmp_path / f"{name}.mp4", crf=0)
            assert film.num_sections == 0
            film.begin(given.split(7), OVERLAP)
        assert film.num_sections == 1
        film.add(part, OVERLAP)
        film.finish()
        return decode(film.path)

    wanted = encoded(reference([given, part], "back"), tmp_path / "direct.mp4", 0)
    np.testing.assert_array_equal(grown("whole", killed=False), wanted)
    np.testing.assert_array_equal(grown("killed", killed=True), wanted)


def test_sections_without_an_overlap_are_published_too(tmp_path: Path) -> None:
    film = GrowingVideo(tmp_path / "parts", tmp_path / "film.mp4", grows="back")
    for index in range(11):
        film.add(section(index, 4), 0)
    assert film.num_shown < film.num_frames
    film.finish()
    assert len(decode(film.path)) == film.num_shown == 44
    with pytest.raises(ValueError, match="of 8 frames cannot be faded by 5 at both ends: give 9 or more"):
        grow(tmp_path / "short", "back", [section(0, 9), section(1, 8)], 2)
