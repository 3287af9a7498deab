"""What hosts of several cards cost: milliseconds of a block where the devices have next to nothing to do, on the CPU.

    python benchmarks/team_host.py --out team_host.json

A Wan of 40 blocks and 4 tokens: what is timed is Python, PyTorch's dispatch and what threads wait for each other.
Nothing of a card is in it: on one, launches take the place of the CPU's small products. "hosts" is a pass of P cards
over P passes of one, the least of each: 1 where cards are asked one after the other and nothing is exchanged, more by
the exchange, and by threads that stand in each other's way. "waits" is how often a thread slept in a block, for another
card's or for Python's lock.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lowvram_video.runtime.several import shared_samples
from lowvram_video.system.atomic_files import write_file
from lowvram_video.team.team import Team
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from measure import machine

CPU = torch.device("cpu")
CONFIG = WanConfig("t2v", 128, 128, 8, 40, text_dim=16, freq_dim=16, text_tokens=4)
LATENT = (16, 1, 4, 4)  # 4 tokens


@dataclass(frozen=True)
class Passes:
    """Seconds of each of some passes, and how often a thread of the process waited for something in all of them."""

    seconds: list[float]
    waits: int


def time_passes(num_cards: int, samples: int, rounds: int) -> Passes:
    """`rounds` passes after one to warm up; samples are shared out first, as a model on several cards does."""
    models = [WanModel(CONFIG) for _ in range(num_cards)]
    for parameter in (each for model in models for each in model.parameters()):
        parameter.zero_()
    team, places = Team([CPU] * num_cards), shared_samples(samples, num_cards)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(samples, *LATENT, generator=generator)
    text, timestep = torch.randn(samples, 4, CONFIG.text_dim, generator=generator), torch.full((samples,), 700.0)

    def run(rank: int) -> torch.Tensor:
        part, ranks = places[rank]
        models[rank].share = team.share(rank, ranks) if len(ranks) > 1 else None
        return models[rank](latent[part], timestep[part], text[part])

    team.run(run)
    seconds, before = [], num_waits()
    for _ in range(rounds):
        began = time.perf_counter()
        team.run(run)
        seconds.append(time.perf_counter() - began)
    waits = num_waits() - before
    team.close()
    return Passes(seconds, waits)


def num_waits() -> int:
    """How often threads of this process slept so far; 0 where the system does not tell."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, cards, samples in (("one", 1, 1), ("shared", 2, 1), ("shared", 4, 1), ("guided", 2, 2)):
        passes = time_passes(cards, samples, options.rounds)
        least = min(passes.seconds)  # of a machine that others use too
        rows.append(
            {
                "name": name,
                "cards": cards,
                "seconds": passes.seconds,
                "block_ms": 1e3 * least / CONFIG.num_layers,
                "waits": passes.waits / options.rounds / CONFIG.num_layers,
                "hosts": least / (cards * min(rows[0]["seconds"])) if rows else 1.0,
            }
        )
    print(f"{'pass':<10}{'cards':>6}{'ms of a block':>15}{'hosts':>8}{'waits':>8}")
    for row in rows:
        print(f"{row['name']:<10}{row['cards']:>6}{row['block_ms']:>15.3f}{row['hosts']:>8.2f}{row['waits']:>8.1f}")
    if options.out is not None:
        write_file(options.out, json.dumps({"machine": machine(), "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
