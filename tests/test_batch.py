"""Many videos by one command: the same bytes as one after the other, whatever is wrong, lost, killed or interrupted."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from lowvram_video.batch.child import Channel, JobError
from lowvram_video.batch.results import Results
from lowvram_video.cli.batch_jobs import options_reader
from lowvram_video.cli.batch_worker import VideoMaker
from lowvram_video.cli.main import main
from lowvram_video.demo.files import DEMO_FILES
from lowvram_video.system.output_lock import OutputLock, file_sha256

COLOURS = ("red", "blue", "green", "pink")
WAIT_SECONDS = 280


def job(folder: Path, number: int, **values: Any) -> dict[str, Any]:
    """A tiny clip of the demo model."""
    return {
        "model": str(DEMO_FILES.model), "text_encoder": str(DEMO_FILES.text_encoder), "vae": str(DEMO_FILES.vae),
        "prompt": f"a {COLOURS[number % 4]} ball moves left", "negative_prompt": "", "seed": number,
        "width": 32, "height": 32, "frames": 5, "steps": 2, "device": "cpu",
        "output": str(folder / f"clip_{number:02d}.mp4"), **values,
    }  # fmt: skip


def save(path: Path, jobs: Iterable[Any]) -> Path:
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in jobs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def results_of(path: Path) -> list[dict[str, Any]]:
    text = path.with_suffix(".results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def made(path: Path) -> Counter[str]:
    """How often each output was made."""
    return Counter(Path(each["output"]).name for each in results_of(path) if each["status"] == "made")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.mp4"))}


def words_of(values: dict[str, Any]) -> list[str]:
    return ["generate", *[f"--{name.replace('_', '-')}={value}" for name, value in values.items()]]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Eight clips by `generate`, one after the other."""
    folder = tmp_path_factory.mktemp("one")
    for number in range(8):
        assert main(words_of(job(folder, number))) == 0
    return hashes(folder)


def start(jobs: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lowvram_video.cli", "batch", str(jobs), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=as_in_a_terminal()
    )


def as_in_a_terminal() -> Callable[[], object] | None:
    """What a process begins with: it would inherit that tests run in the background, where Ctrl-C is ignored."""
    return None if sys.platform == "win32" else functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- made --------------------------------------------------------------------------------------------------


def test_two_workers_make_the_same_bytes_as_one_after_the_other(
    tmp_path: Path, one_by_one: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", number) for number in range(8)])
    assert main(["batch", str(path), "--workers", "2"]) == 0
    assert hashes(tmp_path / "out") == one_by_one
    assert made(path) == dict.fromkeys(one_by_one, 1)
    assert {each["worker"] for each in results_of(path) if each["status"] == "made"} == {"worker 1", "worker 2"}
    assert os.listdir(tmp_path / "out").count("wan") == 0, "runs that are whole are not kept"
    capsys.readouterr()
    before = path.with_suffix(".results.jsonl").read_bytes()
    assert main(["batch", str(path)]) == 0, "made before: nothing is begun"
    assert "8 of 8 jobs were made before" in capsys.readouterr().out
    assert path.with_suffix(".results.jsonl").read_bytes() == before
    (tmp_path / "out" / "clip_03.mp4").unlink()
    assert main(["batch", str(path)]) == 0, "what is gone is made again"
    assert hashes(tmp_path / "out") == one_by_one and made(path)["clip_03.mp4"] == 2


# --- refused -----------------------------------------------------------------------------------------------


def test_a_bad_line_is_refused_before_the_start_and_keep_going_makes_the_rest(
    tmp_path: Path, one_by_one: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path / "out", number) for number in range(4)]
    jobs[2] |= {"width": 33}  # line 3: its type is right, and no worker can make it
    path = save(tmp_path / "jobs.jsonl", jobs)
    assert main(["batch", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"{path}, line 3: 33x32 cannot be made" in told
    assert "1 of 4 jobs cannot be made, and nothing was begun" in told
    assert not list((tmp_path / "out").glob("*.mp4")) and not path.with_suffix(".results.jsonl").exists()
    assert main(["batch", str(path), "--keep-going"]) == 1
    assert f"{path}, line 3: 33x32 cannot be made" in capsys.readouterr().err
    wanted = {f"clip_{number:02d}.mp4" for number in (0, 1, 3)}
    assert hashes(tmp_path / "out") == {name: sha for name, sha in one_by_one.items() if name in wanted}
    refused = [each for each in results_of(path) if each["status"] == "refused"]
    assert [(each["line"], "33x32" in each["error"]) for each in refused] == [(3, True)]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"widht": 32}, "'widht' is no flag of generate; did you mean width?"),
        ({"width": "32"}, "width is text: expected a whole number"),
        ({"width": 32.5}, "width is a number: expected a whole number"),
        ({"seed": True}, "seed is true or false: expected a whole number"),
        ({"prompt": 5}, "prompt is a whole number: expected text"),
        ({"prompt": None}, "the following arguments are required: --prompt"),
        ({"shift": "3"}, "shift is text: expected a number"),
        ({"timesteps": "a,b"}, "argument --timesteps: 'a,b' is no list of numbers"),
        ({"batch_cfg": 1}, "batch_cfg is a whole number: expected true or false"),
        ({"sampler": "best"}, "argument --sampler: invalid choice: 'best'"),
        ({"vram_budget": -1}, "argument --vram-budget: '-1' is no number above 0"),
        ({"lora": [3]}, "lora is a whole number: expected text"),
        ({"output": None}, "it has no output"),
        ({"output": ["a.mp4"]}, "output is a list: expected text"),
        ({"device": "cuda:1"}, "device is cuda:1: workers have a card each"),
        ({"devices": "auto"}, "devices: workers have a card each"),
        ({"help": True}, "'help' is no flag of generate"),
        ({"vram_budget": 1, "vram-budget": 2}, "vram-budget is vram_budget: give one of them"),
        ({"--output": "b.mp4"}, "--output is output: give one of them"),
    ],
)
def test_flags_are_those_of_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], reason: str
) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path, 1), {**job(tmp_path, 2), **values}])
    assert main(["batch", str(path)]) == 2
    assert f"{path}, line 2: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is no JSON"),
        ("[1]", "it is a list: expected an object"),
        ('{"seed": 1, "seed": 2}', "it has seed twice"),
        ('{"shift": NaN}', "NaN is no number that JSON has"),
        ('{"shift": 1e999}', "1e999 is no number that JSON has"),
        ('{"nodes": ' + "[" * 500 + "]" * 500 + "}", "it is nested too deep"),
        ('{"a": ' * 100000, "it is"),
        ('{"prompt": "' + "a" * 2**20 + '"}', "it has 1048590 bytes"),
    ],
    ids=["half", "list", "twice", "nan", "beyond", "deep", "deeper", "long"],
)
def test_lines_that_are_no_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str) -> None:
    path = save(tmp_path / "jobs.jsonl", ["", json.dumps(job(tmp_path, 1)), line])
    assert main(["batch", str(path)]) == 2
    assert f"{path}, line 3: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"output": "a\ud800.mp4"}, "output has half a character at"),
        ({"prompt": "a \ud800 cat"}, "prompt has half a character at 3"),
        ({"output": "a\0.mp4"}, "expected a path"),
    ],
    ids=["output", "prompt", "nul"],
)
def test_texts_that_no_file_system_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], reason: str
) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path, 1), json.dumps({**job(tmp_path, 2), **values})])
    assert main(["batch", str(path)]) == 2
    assert any("line 2: " in line and reason in line for line in capsys.readouterr().err.splitlines())


def test_outputs_do_not_collide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        job(tmp_path, 1),
        job(tmp_path, 2, output=str(tmp_path / "sub" / ".." / "clip_01.mp4")),
        job(tmp_path, 3, report=str(tmp_path / "a.json")),
        job(tmp_path, 4, report=str(tmp_path / "a.json")),
        job(tmp_path, 5, image=str(tmp_path / "clip_01.mp4")),
        job(tmp_path, 6, report=str(tmp_path / "jobs.jsonl")),
    ]
    assert main(["batch", str(save(tmp_path / "jobs.jsonl", jobs))]) == 2
    told = capsys.readouterr().err
    for line, reason in ((2, "is written by line 1 too"), (4, "is written by line 3 too"), (5, "make two batches")):
        assert any(f"line {line}: " in each and reason in each for each in told.splitlines()), told
    assert "line 6: " in told and "is a file of this batch" in told
    assert "line 1: " not in told and "line 3: " not in told


def test_files_that_are_missing_or_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip_02.mp4").write_bytes(b"precious")
    jobs = [
        job(tmp_path, 1, vae=str(tmp_path / "none.safetensors")),
        job(tmp_path, 2),
        job(tmp_path, 3, output=str(tmp_path / "a.txt")),
        job(tmp_path, 4, model=str(tmp_path / "none.safetensors")),
        job(tmp_path, 5, image=str(tmp_path / "none.png")),
        job(tmp_path, 6, prompt=" "),
        job(tmp_path, 7, clip_l=str(DEMO_FILES.vae)),
    ]
    path = save(tmp_path / "jobs.jsonl", jobs)
    assert main(["batch", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    reasons = [
        "no such file",
        "exists already",
        "is no video file name",
        "no such file",
        "none.png",
        "empty",
        "--clip-l",
    ]
    for line, reason in enumerate(reasons, 1):
        assert any(f"line {line}: " in each and reason in each for each in told), (line, told)
    assert (tmp_path / "clip_02.mp4").read_bytes() == b"precious"


def test_a_file_without_jobs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", str(save(tmp_path / "jobs.jsonl", [""]))]) == 2
    assert main(["batch", str(tmp_path / "none.jsonl")]) == 2
    assert main(["batch", str(tmp_path)]) == 2
    assert main(["batch", "."]) == 2
    told = capsys.readouterr().err
    assert "has no jobs" in told and "No such file" in told and told.count("is a folder: give a file with one") == 2
    assert os.listdir(tmp_path) == ["jobs.jsonl"], "where nothing was begun no results are left"


def test_the_same_job_is_known_by_what_it_makes(tmp_path: Path) -> None:
    read = options_reader()
    plain = job(tmp_path, 1)
    key = read(1, plain).job.key
    same = [dict(reversed(plain.items())), {**plain, "overwrite": True}, {**plain, "report": "a.json", "lora": []}]
    assert {read(2, each).job.key for each in same} == {key}
    others = [{"seed": 2}, {"metadata": "none"}, {"output": "b.mp4"}, {"sparse": "fast"}]
    assert len({key, *(read(3, plain | each).job.key for each in others)}) == 1 + len(others)


# --- killed and interrupted --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_batch_that_was_killed_goes_on(tmp_path: Path, one_by_one: dict[str, str]) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", number) for number in range(8)])
    process = start(path)
    wait_for(lambda: path.with_suffix(".results.jsonl").exists() and sum(made(path).values()) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    with path.with_suffix(".results.jsonl").open("ab") as file:
        file.write(b'{"output": "half a li')  # as a full disk leaves it
    wait_for(lambda: not any(child.is_running() for child in children))
    before = sum(made_lines(path).values())
    assert main(["batch", str(path)]) == 0
    assert hashes(tmp_path / "out") == one_by_one
    again = made_lines(path)
    assert set(again) == set(one_by_one) and set(again.values()) == {1} and before >= 2
    assert not list((tmp_path / "out").glob("*.partial*"))


def made_lines(path: Path) -> Counter[str]:
    """As `made`, of a file with half a line in it."""
    found: Counter[str] = Counter()
    for line in path.with_suffix(".results.jsonl").read_text().splitlines():
        if line.endswith("}"):
            record = json.loads(line)
            found[Path(record["output"]).name] += record["status"] == "made"
    return +found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the signal is a terminal's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_and_the_batch_goes_on(
    tmp_path: Path, one_by_one: dict[str, str], number: signal.Signals
) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", number) for number in range(8)])
    process = start(path, "--workers", "2")
    wait_for(lambda: path.with_suffix(".results.jsonl").exists() and sum(made(path).values()) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, err
    assert b"jobs are made; the same command goes on from there" in err
    assert children and not any(child.is_running() for child in children)
    assert main(["batch", str(path)]) == 0
    assert hashes(tmp_path / "out") == one_by_one and set(made(path).values()) == {1}


def test_results_are_not_added_to_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", 1)])
    before = path.read_bytes()
    for _ in range(2):  # the refused one leaves no lock
        assert main(["batch", str(path), "--results", str(path)]) == 2
        assert "jobs.jsonl is no file of results" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_two_batches_do_not_write_one_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", 1)])
    with Results(path.with_suffix(".results.jsonl")):
        assert main(["batch", str(path)]) == 2
    assert "is being written by another batch" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="has no such devices")
def test_a_device_in_the_place_of_results_stays(tmp_path: Path) -> None:
    path = tmp_path / "null"
    path.symlink_to(os.devnull)
    with Results(path):
        pass
    assert path.is_symlink()


def test_half_a_first_line_does_not_keep_a_batch_from_going_on(tmp_path: Path) -> None:
    path = tmp_path / "a.results.jsonl"
    path.write_bytes(b'{"out')  # as a full disk leaves it
    for status in ("begun", "made", "made"):
        with Results(path) as results:
            results.add("a.mp4", status)
    assert results.last(Path("a.mp4"))["status"] == "made"
    for other in (b"\nprecious", b"precious\n", b'{"out": 1}\n'):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="is no file of results"):
            Results(path)
        assert path.read_bytes() == other


# --- a worker, and what is at its output -----------------------------------------------------------------------


@pytest.fixture
def maker() -> VideoMaker:
    class NoChannel:
        def hold(self) -> None: ...
        def check(self) -> None: ...
        def release(self) -> None: ...
        def say(self, kind: str, values: Any) -> None: ...

    return VideoMaker(cast(Channel, NoChannel()))


def request_for(values: dict[str, Any]) -> dict[str, Any]:
    return dict(options_reader()(1, values).job.request)


def test_somebody_elses_file_is_not_what_a_failed_job_left(tmp_path: Path, maker: VideoMaker) -> None:
    request = request_for(job(tmp_path, 1))
    (tmp_path / "clip_01.mp4").write_bytes(b"precious")  # after the check
    with pytest.raises(JobError, match="exists already") as raised:
        maker.make(request)
    assert "left" not in raised.value.values


def test_a_check_is_no_reason_to_replace_a_file(tmp_path: Path, maker: VideoMaker) -> None:
    request = request_for(job(tmp_path, 1))
    (tmp_path / "clip_01.mp4").write_bytes(b"precious")
    with pytest.raises(JobError, match="exists already"):
        maker.check({**request, "attempt": 1})  # the worker before was lost as it checked


def test_a_worker_of_a_killed_batch_that_still_ends_is_waited_for(tmp_path: Path, maker: VideoMaker) -> None:
    request = request_for(job(tmp_path, 1))
    held = OutputLock(tmp_path / "clip_01.mp4")
    threading.Timer(1, held.release).start()
    assert maker.make({**request, "own": True})["sha256"] == file_sha256(tmp_path / "clip_01.mp4")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there the system only ends processes at once")
def test_a_worker_that_others_terminate_loses_no_job(tmp_path: Path) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", number, steps=20) for number in range(3)])
    process = start(path, "--workers", "1")
    wait_for(lambda: path.with_suffix(".results.jsonl").exists() and results_of(path))
    for child in psutil.Process(process.pid).children():
        child.terminate()
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, err
    assert made(path) == {f"clip_{number:02d}.mp4": 1 for number in range(3)}, out
    assert [each["line"] for each in results_of(path) if each["status"] == "lost"] == [1]
