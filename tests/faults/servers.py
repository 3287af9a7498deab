"""A real ComfyUI that is killed in mid-run and started again: the same workflow goes on to the same latents."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from ..comfyui.conftest import ComfyUI
from ..comfyui.server import PROMPT_SECONDS, Graph, PromptError, Server
from .files import tensors_of
from .graphs import SAMPLERS, framepack, make_models, two_experts, wan
from .record import Known
from .table import Row

SEED = 7
LONGEST = {"FramePack": 9}  # changes of files in a run, at least
CHANGES = 20  # in one of Wan


class MakeGraph(Protocol):
    """The workflow of a name; `kill_at` as the node TestKillAt has it."""

    def __call__(self, name: str, *, kill_at: int = 0) -> Graph: ...


JOBS: Mapping[str, MakeGraph] = {
    **{sampler: partial(wan, seed=SEED) for sampler in SAMPLERS},
    "two experts": partial(two_experts, seed=SEED),
    "FramePack": partial(framepack, seed=SEED),
}
WHOLE: Mapping[str, Graph] = {
    **{sampler: wan(f"{sampler}-whole", SEED, resumable=False) for sampler in SAMPLERS},
    "two experts": two_experts("whole", SEED, resumable=False),
    "FramePack": framepack("framepack-whole", SEED, resume=False),
}


def kill_servers(comfyui: ComfyUI, place: Path, points: int, known: Known) -> Iterator[Row]:
    """So many kills, by turns of samplers, two experts and FramePack, each at another change of a file."""
    base = place / "server"
    shutil.rmtree(base, ignore_errors=True)
    make_models(base)
    with Server(comfyui.folder, comfyui.python, base) as server:
        for name in JOBS:
            server.run(WHOLE[name])
    wanted = {name: _made(base, name, whole=True) for name in JOBS}
    yield from (known[point] for point in map(_point, range(points)) if point in known)
    left = [number for number in range(points) if _point(number) not in known]
    pending: tuple[int, str] | None = None
    for number in [*left, None]:
        with Server(comfyui.folder, comfyui.python, base) as server:
            if pending is not None:
                yield _go_on(server, *pending, wanted[_job(pending[0])[0]])
            if number is not None:
                pending = number, _killed(server, *_job(number))


def _job(number: int) -> tuple[str, int]:
    """What is killed, and at which change of a file."""
    name = list(JOBS)[number % len(JOBS)]
    turn = number // len(JOBS)
    return name, 2 + (turn * 5 + number * 3) % (LONGEST.get(name, CHANGES) - 1)


def _point(number: int) -> tuple[str, str]:
    """The fault, and where: as a row says it."""
    name, at = _job(number)
    return f"kill: ComfyUI's server, {name}", f"change {at}"


def _killed(server: Server, name: str, at: int) -> str:
    """What became of the server."""
    _forget(server.base)
    graph = JOBS[name](_title(name), kill_at=at)
    try:
        prompt = server.queue(graph)
        end = time.monotonic() + PROMPT_SECONDS
        while time.monotonic() < end:
            if server.process_ended(0.05) is not None:
                return "killed"
            if prompt in server.get(f"/history/{prompt}"):
                return "it had ended"
    except (OSError, PromptError, ConnectionError):
        pass
    return "killed" if server.process_ended(10) is not None else "hung"


def _go_on(server: Server, number: int, how: str, wanted: str) -> Row:
    name, _ = _job(number)
    kept = len(list(server.base.glob("output/wan/*/step_*"))) + len(list(server.base.glob("output/framepack/*/sec*")))
    began = time.monotonic()
    try:
        server.run(JOBS[name](_title(name)))
        same = _made(server.base, name) == wanted
        seen = "same bits" if same else "OTHER BITS"
    except (PromptError, TimeoutError) as error:
        seen, same = f"failed: {str(error)[:120]}", False
    if how != "killed":
        seen = f"{how}, {seen}"
    more = {"kept": kept, "seconds": round(time.monotonic() - began, 2)}
    return Row(*_point(number), same and how != "hung", seen, more)


def _title(name: str) -> str:
    return name.replace(" ", "_").lower() + "-killed"


def _made(base: Path, name: str, whole: bool = False) -> str:
    """The latest latent of a job."""
    titles = {"two experts": "whole", "FramePack": "framepack-whole"}
    title = titles.get(name, f"{name}-whole") if whole else _title(name)
    found = sorted((base / "output" / "latents").glob(f"{title}_*.latent"))
    return tensors_of(found[-1]) if found else ""


def _forget(base: Path) -> None:
    """Begin anew: what runs before left is no part of this one."""
    for folder in ("wan", "framepack"):
        shutil.rmtree(base / "output" / folder, ignore_errors=True)
