"""A batch on a Ray cluster of two machines, one of which is lost; Ray is an extra, so it is not everywhere."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lowvram_video.cli.main import main
from lowvram_video.system.output_lock import file_sha256

from .test_batch import hashes, job, made, results_of, save, start, wait_for, words_of

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("ray.cluster_utils")
NUM_JOBS = 24


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two machines with a CPU each, in this one."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
def test_a_lost_machines_jobs_are_made_on_the_other_and_none_twice(tmp_path: Path, cluster: Any) -> None:
    machine = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    jobs = [job(tmp_path / "out", number) for number in range(NUM_JOBS)]
    path = save(tmp_path / "jobs.jsonl", jobs)
    process = start(path, "--ray", cluster.address)
    wait_for(lambda: path.with_suffix(".results.jsonl").exists() and workers_of(path) == {"ray 1", "ray 2"})
    cluster.remove_node(machine, allow_graceful=False)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for number in range(NUM_JOBS):
        assert main(words_of(job(tmp_path / "one", number))) == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one") and len(hashes(tmp_path / "out")) == NUM_JOBS
    assert set(made(path).values()) == {1} and len(made(path)) == NUM_JOBS
    assert any(each["status"] == "lost" for each in results_of(path)), "it was at work when it was lost"


def workers_of(path: Path) -> set[str]:
    """Who has made something."""
    return {each["worker"] for each in results_of(path) if each["status"] == "made"}


def test_ray_local_makes_the_same_and_leaves_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", 1)])
    command = [sys.executable, "-m", "lowvram_video.cli", "batch", str(path), "--ray", "local", "--workers", "1"]
    ended = subprocess.run(command, capture_output=True, timeout=180, env=os.environ | {"RAY_ADDRESS": ""})
    assert ended.returncode == 0, ended.stderr
    assert main(words_of(job(tmp_path / "one", 1))) == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one")
    result = json.loads(path.with_suffix(".results.jsonl").read_text().splitlines()[-1])
    assert result["worker"] == "ray 1" and result["sha256"] == file_sha256(tmp_path / "out" / "clip_01.mp4")


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "jobs.jsonl", [job(tmp_path / "out", 1)])
    assert main(["batch", str(path), "--ray", "127.0.0.1:1"]) == 2
    assert "the Ray cluster at 127.0.0.1:1 cannot be joined" in capsys.readouterr().err
