"""Hours of use of a real ComfyUI in minutes: runs, interrupts, frees and pauses; memory, handles and threads stay flat.

    python -m tests.faults.long_queue [--runs 100 --interrupts 20 --frees 10 --pauses 10] [--out long_queue.json]

COMFYUI_DIR or ~/ComfyUI, on the CPU with tiny models. An interrupt ends a run for good; a pause is an interrupt after
which the same workflow is queued again, and must give the latents of one that was not stopped. After each the server's
RAM, open files and sockets, threads and temporary files are read. Flat: in the last third of a kind there are no more
handles and threads than in its second third, and RAM has not grown by more than `MOST_MIB` in all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from lowvram_video.system.atomic_files import write_file

from ..comfyui.conftest import ComfyUI, installations
from ..comfyui.server import Server
from .files import tensors_of
from .graphs import HIGH, LOW, framepack, make_models, wan

MOST_MIB = 60.0
FIGURES = ("rss_mib", "threads", "handles", "temporary")


class LongQueue:
    """A server, and what was seen of it after each thing that was asked."""

    def __init__(self, server: Server, seed: int = 1) -> None:
        self._server, self._draw = server, random.Random(seed)
        self.rows: list[dict[str, Any]] = []

    def runs(self, count: int) -> None:
        """Whole ones, of two models and of FramePack in turn."""
        for number in range(count):
            if number % 5 == 4:
                graph = framepack(f"run-{number}", number)
            else:
                graph = wan(f"euler-run-{number}", number, 2, (HIGH, LOW)[number % 2], resumable=number % 3 == 0)
            self._server.run(graph)
            self._note("runs", "success")

    def interrupts(self, count: int) -> None:
        """Endless runs that are ended."""
        for number in range(count):
            name, seed = f"euler-cut-{number}", 1000 + number
            graph = framepack(name, seed, 60, 3.0) if number % 4 == 3 else wan(name, seed, 400)
            self._note("interrupts", self._interrupted(graph, self._draw.uniform(0, 2)))

    def frees(self, count: int) -> None:
        """Runs after each of which all memory is given back."""
        for number in range(count):
            self._server.run(wan(f"euler-free-{number}", 2000 + number, 2, (HIGH, LOW)[number % 2]))
            self._server.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(0.3)
            self._note("frees", "success")

    def pauses(self, count: int) -> None:
        """Runs that are interrupted and queued again; those of before say what they make."""
        whole = wan("euler-whole", 3000, 40, resumable=False)
        self._server.run(whole)
        wanted = self._latent("euler-whole")
        for number in range(count):
            name = f"euler-pause-{number}"
            self._interrupted(wan(name, 3000, 40), self._draw.uniform(0.1, 0.8))
            self._server.run(wan(name, 3000, 40))
            self._note("pauses", "same bits" if self._latent(name) == wanted else "OTHER BITS")

    def _interrupted(self, graph: Any, seconds: float) -> str:
        """How the run ended, in words."""
        prompt = self._server.queue(graph)
        time.sleep(seconds)
        began = time.monotonic()
        self._server.post("/interrupt", {})
        messages = self._server.wait(prompt, 60)["status"]["messages"]
        took = time.monotonic() - began
        kind = messages[-1][0].removeprefix("execution_")
        return kind if took < 5 else f"{kind} after {took:.0f} s"

    def _latent(self, name: str) -> str:
        found = sorted((self._server.base / "output" / "latents").glob(f"{name}_*.latent"))
        return tensors_of(found[-1])

    def _note(self, kind: str, ended: str) -> None:
        process = psutil.Process(self._server.pid)
        with process.oneshot():
            rss, threads = process.memory_info().rss / 2**20, process.num_threads()
            handles = process.num_handles() if sys.platform == "win32" else process.num_fds()
        temporary = self._server.base / "temp"
        left = sum(1 for _ in temporary.rglob("*")) if temporary.exists() else 0
        row = {"kind": kind, "ended": ended, "rss_mib": round(rss, 1), "threads": threads, "handles": handles}
        self.rows.append(row | {"temporary": left})


def judged(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each kind the medians of its thirds, and whether they are flat."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = [row for row in rows if row["kind"] == kind]
        size = max(1, len(of) // 3)
        thirds = [of[:size], of[size : len(of) - size] or of[:size], of[-size:]]
        medians = {name: [statistics.median(row[name] for row in third) for third in thirds] for name in FIGURES}
        flat = all(medians[name][2] <= medians[name][1] for name in FIGURES if name != "rss_mib")
        flat = flat and medians["rss_mib"][2] - medians["rss_mib"][1] < MOST_MIB
        ends = {end: sum(row["ended"] == end for row in of) for end in {row["ended"] for row in of}}
        yield {"kind": kind, "count": len(of), "ends": ends, "thirds": medians, "flat": flat}


def long_queue(comfyui: ComfyUI, base: Path, counts: dict[str, int]) -> dict[str, Any]:
    """All of it, in one server."""
    make_models(base)
    began = time.monotonic()
    with Server(comfyui.folder, comfyui.python, base) as server:
        queue = LongQueue(server)
        for kind, count in counts.items():
            ask: Callable[[int], None] = getattr(queue, kind)
            ask(count)
            print(f"{kind}: {count}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        log = server.log.read_text(encoding="utf-8", errors="replace")
    kinds = list(judged(queue.rows))
    return {
        "comfyui": comfyui.version, "seconds": round(time.monotonic() - began), "kinds": kinds,
        "tracebacks_in_the_log": log.count("Traceback (most recent call last)"), "rows": queue.rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, count in (("runs", 100), ("interrupts", 20), ("frees", 10), ("pauses", 10)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = installations()
    if not found:
        raise SystemExit("no ComfyUI in COMFYUI_DIR or ~/ComfyUI")
    counts = {kind: getattr(options, kind) for kind in ("runs", "interrupts", "frees", "pauses")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result = long_queue(found[0], Path(folder), counts)
    if options.out is not None:
        write_file(options.out, json.dumps(result, indent=1).encode())
    for row in result["kinds"]:
        thirds = {name: " -> ".join(f"{value:g}" for value in row["thirds"][name]) for name in FIGURES}
        print(f"{row['kind']} {row['count']} {row['ends']} {thirds} {'flat' if row['flat'] else 'NOT FLAT'}")
    print(f"{result['seconds']} s, tracebacks in the log: {result['tracebacks_in_the_log']}")


if __name__ == "__main__":
    main()
