"""Who makes a batch's jobs: processes here, a worker for each card; or a Ray cluster; or ComfyUI servers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import torch

from ..batch.comfyui_crew import ComfyUICrew
from ..batch.job import Job
from ..batch.process import Command, LocalCrew, sharing_ram
from ..batch.ray_crew import RayCrew, RayPlan
from ..batch.worker import Crew
from .batch_comfyui import WorkflowReader
from .batch_jobs import JobReader, options_reader, want_cards

WORKER = f"{__package__}.batch_worker"
CARDS = "CUDA_VISIBLE_DEVICES"


def add_crew(parser: argparse.ArgumentParser) -> None:
    """The flags that say who."""
    parser.add_argument("--workers", type=worker_count, metavar="N", help="how many at a time (one for each card)")
    elsewhere = parser.add_mutually_exclusive_group()
    elsewhere.add_argument(
        "--comfyui", nargs="+", metavar="URL",
        help="ComfyUI servers, such as http://192.168.1.20:8188; jobs are then values for a workflow",
    )  # fmt: skip
    parser.add_argument(
        "--workflow", metavar="NAME", help="with --comfyui: an example's name, or a file, for jobs that name none"
    )
    elsewhere.add_argument(
        "--ray", metavar="ADDRESS",
        help="workers on a Ray cluster, such as 192.168.1.10:6379 or auto; local starts one here (pip install ray)",
    )  # fmt: skip


def reader_for(options: argparse.Namespace) -> JobReader:
    """What reads the lines of their jobs. ValueError for flags that do not go together."""
    if options.comfyui is None:
        if options.workflow is not None:
            raise ValueError("--workflow is for ComfyUI servers: give --comfyui URL too")
        return options_reader()
    if options.workers is not None:
        raise ValueError("--workers is not for ComfyUI servers: each makes one job of a batch at a time")
    return WorkflowReader(options.workflow)


def crew_for(options: argparse.Namespace, jobs: Sequence[Job]) -> Crew:
    """The workers, not started yet."""
    if options.comfyui is not None:
        return ComfyUICrew(list(dict.fromkeys(_checked_url(url) for url in options.comfyui)))
    if options.ray is not None:
        return RayCrew(RayPlan(options.ray, WORKER, want_cards(jobs), options.workers), len(jobs))
    return LocalCrew(_local_commands(options.workers, jobs))


def _local_commands(workers: int | None, jobs: Sequence[Job]) -> list[Command]:
    """A process for each card, or as many as were asked for, in turn on the cards."""
    cards = _cards() if want_cards(jobs) is not False else []
    size = min(workers or max(1, len(cards)), len(jobs))
    words = sharing_ram([sys.executable, "-m", WORKER], size)
    return [Command(words, {CARDS: cards[seat % len(cards)]} if cards else {}) for seat in range(size)]


def _cards() -> list[str]:
    """The cards that this process may use, as the environment names them."""
    named = os.environ.get(CARDS)
    if named:
        return [name.strip() for name in named.split(",")][: torch.cuda.device_count()]
    return [str(number) for number in range(torch.cuda.device_count())]


def worker_count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers from 1 up")
    return int(text)


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # a port may be no number
    except ValueError:
        is_one = False
    if not is_one:
        raise ValueError(f"{url!r} is no address of a ComfyUI server: give one such as http://192.168.1.20:8188")
    if parts.username or parts.password or parts.query or parts.fragment:  # each would be in the results
        raise ValueError(f"the address of {parts.hostname} has more than a host, a port and a path: leave that out")
    return url.rstrip("/")
