"""`batch --comfyui` with real servers: one of two is killed, workflows are made prompts as the page makes them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowvram_video.batch.workflow import make_prompt
from lowvram_video.cli.main import main
from lowvram_video.system.output_lock import file_sha256

from . import workflows
from .conftest import ComfyUI
from .server import Server

NUM_JOBS = 24
WAIT_SECONDS = 300


def job(folder: Path, number: int, **values: Any) -> dict[str, Any]:
    return {
        "workflow": "demo", "prompt": f"a {('red', 'blue')[number % 2]} ball moves left", "seed": number,
        "width": 64, "height": 48, "frames": 5, "steps": 2, "output": str(folder / f"clip_{number:02d}.mp4"), **values,
    }  # fmt: skip


def save(path: Path, jobs: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(each) for each in jobs), encoding="utf-8")
    return path


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def results_of(path: Path) -> list[dict[str, Any]]:
    found = path.with_suffix(".results.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.mp4"))}


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_servers_jobs_are_made_by_the_other_and_none_twice(
    server: Server, comfyui: ComfyUI, tmp_path: Path
) -> None:
    one = save(tmp_path / "one.jsonl", [job(tmp_path / "one", number) for number in range(NUM_JOBS)])
    assert main(["batch", str(one), "--comfyui", url(server)]) == 0
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", number) for number in range(NUM_JOBS)])
    (tmp_path / "base").mkdir()
    with Server(comfyui.folder, comfyui.python, tmp_path / "base") as other:
        command = [sys.executable, "-m", "lowvram_video.cli", "batch", str(path), "--comfyui", url(server), url(other)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        at_work = {"status": "begun", "worker": url(other)}
        wait_for(lambda: {each["worker"] for each in results_of(path) if each["status"] == "made"} >= {url(other)})
        last: dict[str, Any] = {}
        wait_for(lambda: last.update(results_of(path)[-1]) or last.items() >= at_work.items())
        other.kill()
        _, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, err
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one") and len(hashes(tmp_path / "out")) == NUM_JOBS
    made = Counter(each["line"] for each in results_of(path) if each["status"] == "made")
    assert made == dict.fromkeys(range(1, NUM_JOBS + 1), 1)
    assert any(each["status"] == "lost" for each in results_of(path))


def test_what_a_server_cannot_make_is_refused_before_the_start(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, 1), job(tmp_path, 2, sampler="none"), job(tmp_path, 3, window=3), job(tmp_path, 4, steps=-1)]
    assert main(["batch", str(save(tmp_path / "jobs.jsonl", jobs)), "--comfyui", url(server)]) == 2
    told = capsys.readouterr().err
    for line, reason in ((2, "the server has no 'none'"), (3, "window: this workflow has no place"), (4, "expected 1")):
        assert any(f"line {line}: " in each and reason in each for each in told.splitlines()), told
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("name", workflows.NAMES)
def test_workflows_become_the_prompts_that_the_page_makes(name: str, object_info: dict[str, Any]) -> None:
    workflow = workflows.load(name)
    expected = workflows.to_prompt(workflow, object_info)
    for node in expected.values():
        node["inputs"].pop("video-preview", None)  # the page's player, which no server reads
    assert make_prompt(workflow, object_info).graph == expected
