"""What `batch` costs beside its videos, and whether its memory stays what it was: a thousand tiny clips on the CPU.

    python benchmarks/batch_overhead.py --out benchmarks/results/batch_cpu_DATE.json

One worker makes clips of the demo model. Told is the time between a job's end and the next one's begin (the results'
file is written, and flushed to the disk, in it), what checking a job before the start takes, and the memory of this
process's two children, the command and its worker, at each tenth of the jobs: peaks between are in it as far as the
sampling (`SAMPLE_SECONDS`) sees them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from lowvram_video.demo.files import DEMO_FILES
from lowvram_video.system.atomic_files import write_file
from measure import machine

SAMPLE_SECONDS = 0.25
NUM_TENTHS = 10
MIB = 2**20


def main() -> None:
    """Print the figures, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        jobs = write_jobs(Path(folder), options.jobs)
        samples = run(jobs, options.jobs)
        results = [json.loads(line) for line in results_of(jobs).read_text().splitlines()]
    found = {"machine": machine(), "jobs": options.jobs, **times(results, samples), "memory": memory(samples)}
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        write_file(options.out, text.encode("ascii") + b"\n")


def write_jobs(folder: Path, num_jobs: int) -> Path:
    """A file of jobs that differ by their seed."""
    made_with = {
        "model": str(DEMO_FILES.model), "text_encoder": str(DEMO_FILES.text_encoder), "vae": str(DEMO_FILES.vae),
        "prompt": "a red ball moves left", "negative_prompt": "", "width": 16, "height": 16, "frames": 1, "steps": 1,
        "device": "cpu",
    }  # fmt: skip
    lines = [json.dumps({**made_with, "seed": n, "output": str(folder / f"{n:06d}.mp4")}) for n in range(num_jobs)]
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(lines))
    return path


def results_of(jobs: Path) -> Path:
    return jobs.with_suffix(".results.jsonl")


def run(jobs: Path, num_jobs: int) -> list[dict[str, Any]]:
    """Make them; (seconds, jobs done, bytes of the command, bytes of its worker) as they were seen meanwhile."""
    command = [sys.executable, "-m", "lowvram_video.cli", "batch", str(jobs), "--workers", "1"]
    began, samples, size, num_made = time.monotonic(), [], 0, 0
    with (
        tempfile.TemporaryFile() as told,  # no pipe, which fills up with a line for each job
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told) as process,
    ):
        while process.poll() is None:
            path = results_of(jobs)
            if path.exists() and path.stat().st_size != size:
                size = path.stat().st_size
                num_made = path.read_bytes().count(b'"made"')
            samples.append({"seconds": time.monotonic() - began, "made": num_made, **resident_bytes(process.pid)})
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            told.seek(0)
            raise RuntimeError(told.read().decode(errors="replace")[-2000:])
    return samples


def resident_bytes(pid: int) -> dict[str, int]:
    """Memory of the command and of its worker; 0 for one that is not there."""
    try:
        command = psutil.Process(pid)
        children = command.children()
        # ffmpeg is a child of the worker's, not of the command
        return {
            "command": command.memory_info().rss,
            "worker": max((child.memory_info().rss for child in children), default=0),
        }
    except psutil.Error:
        return {"command": 0, "worker": 0}


def times(results: list[dict[str, Any]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a job by the worker's own clock, and of everything beside it."""
    made = [each for each in results if each["status"] == "made"]
    making = [sample["seconds"] for sample in samples if sample["made"]]
    wall, inside = making[-1] - making[0], sum(each["seconds"] for each in made[1:])
    return {
        "made": len(made),
        "seconds_of_a_job": {
            "median": statistics.median(each["seconds"] for each in made),
            "first_hundred_median": statistics.median(each["seconds"] for each in made[:100]),
            "last_hundred_median": statistics.median(each["seconds"] for each in made[-100:]),
        },
        "wall_seconds": wall,
        "overhead_seconds_of_a_job": (wall - inside) / max(1, len(made) - 1),
        "check_seconds_of_a_job": making[0] / len(made),  # with the start of both processes
    }


def memory(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most of each tenth of the jobs, in MiB."""
    total = samples[-1]["made"]
    found = []
    for tenth in range(NUM_TENTHS):
        low, high = total * tenth / NUM_TENTHS, total * (tenth + 1) / NUM_TENTHS
        inside = [sample for sample in samples if low < sample["made"] <= high and sample["worker"]]
        peaks = {name: max((each[name] for each in inside), default=0) // MIB for name in ("command", "worker")}
        found.append({"jobs": round(high), **{f"{name}_mib": peak for name, peak in peaks.items()}})
    return found


if __name__ == "__main__":
    main()
