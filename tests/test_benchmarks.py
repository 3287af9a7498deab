"""What benchmarks share: processes that measure in turn, rows that outlast what made them."""

from __future__ import annotations

from pathlib import Path

from lowvram_video.benchmarks.workers import Worker

SCRIPT = """
import json, sys, time
if sys.argv[1] == "fails":
    raise ValueError("no such thing")
if sys.argv[1] == "hangs":
    time.sleep(600)
print(json.dumps({"ready": True}), flush=True)
sys.stdin.readline()
print(json.dumps({"found": sys.argv[1]}), flush=True)
if sys.argv[1] == "hangs later":
    time.sleep(600)
"""


def worker(way: str, folder: Path) -> Worker:
    return Worker(way, ["-c", SCRIPT, way], folder / f"{way}.log", {})


def test_a_process_that_hangs_takes_nobody_elses_time(tmp_path: Path) -> None:
    workers = {way: worker(way, tmp_path) for way in ("works", "hangs", "hangs later", "fails")}
    for way, each in workers.items():
        each.wait_until_ready(0.0 if way == "hangs" else 60.0)
    found = {way: each.results(0.0 if way == "hangs later" else 60.0) for way, each in workers.items()}
    assert found["works"] == [{"found": "works"}] and not workers["works"].failed
    assert found["hangs"] == [] and workers["hangs"].failed == "not ready within 0 s"
    assert workers["hangs later"].failed == "not measured within 0 s"
    assert found["fails"] == [] and workers["fails"].failed == "ValueError: no such thing"
