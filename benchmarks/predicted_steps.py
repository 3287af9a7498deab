"""Steps as a card's measurements predict them against steps as they were measured, for the results kept here.

python benchmarks/predicted_steps.py benchmarks/cards/nvidia-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowvram_video.card.models import LARGE, framepack_footprint, wan_footprint
from lowvram_video.framepack.footprint import SectionSize
from lowvram_video.framepack.sections import num_frames
from lowvram_video.memory.plan.footprint import UNLIMITED, Choice, Limits, ModelFootprint, WorkSize
from lowvram_video.memory.plan.limits import with_card
from lowvram_video.memory.plan.pass_times import compute_seconds
from lowvram_video.system.card_profile import CardProfile, load_profile
from lowvram_video.wanvideo.footprint import wan_work
from measure import RESULTS

WITHIN_PERCENT = 10.0
# Whose steps are compared; those of other programs, of LoRAs and of whole videos are none of a plan's alone.
FILES = ("streaming_*h200*.json", "quantized_runs_*h200*.json", "framepack_*h200*.json")


@dataclass(frozen=True)
class Compared:
    """A step of a results file. `disk_gbps` where blocks came from the disk: as `dd` read it, with one thread."""

    file: str
    name: str
    measured: float
    predicted: float
    disk_gbps: float | None

    @property
    def off_percent(self) -> float:
        return 100 * (self.predicted / self.measured - 1)


def compare(card: CardProfile) -> Iterator[Compared]:
    """Every step of the results that are kept."""
    for pattern in FILES:
        for path in sorted(RESULTS.glob(pattern)):
            results = json.loads(path.read_text(encoding="utf-8"))
            for case in results["cases"]:
                if case.get("step") and not case.get("loras"):
                    yield _compared(path.name, case, card, results.get("disk_gbps"))


def _compared(file: str, case: dict[str, Any], card: CardProfile, disk_gbps: float | None) -> Compared:
    model, work = _planned(case)
    limits = with_card(Limits(UNLIMITED), card)
    from_disk = disk_gbps if case.get("ram_gib") else None
    choice = Choice(
        token_chunk=case["token_chunk"],
        head_groups=case["head_groups"],
        cache_text_kv=bool(case.get("cache_text_kv")),
        num_resident=model.num_blocks - case["streamed"],
        transient_fixed=False,
    )
    rate = limits.h2d_gbps if from_disk is None else min(from_disk, limits.h2d_gbps)
    transfer = (case.get("streamed_bytes") or 0) / 1e9 / rate
    predicted = max(compute_seconds(model, work, choice, limits), transfer)
    return Compared(file, case["name"], case["step"], predicted, from_disk)


def _planned(case: dict[str, Any]) -> tuple[ModelFootprint, WorkSize]:
    path = Path(case["path"]).name
    quantization = case.get("quantization") or "none"
    form = "bf16" if "bf16" in path else path.split(".")[0].upper() if path.endswith(".gguf") else "fp8"
    form = {"fp8_fast": "fp8 with fp8_fast", "int8": "int8 of fp8"}.get(quantization, form)
    if "framepack" in path:
        return _framepack(form), SectionSize(num_frames(9), 608, 640)
    return _wan(form), wan_work(LARGE, (case["width"], case["height"], case["frames"]))


@cache
def _wan(form: str) -> ModelFootprint:
    return wan_footprint(LARGE, form)


@cache
def _framepack(form: str) -> ModelFootprint:
    return framepack_footprint(form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", type=Path, help="what `lowvram-video bench` wrote of the card of those results")
    found = list(compare(load_profile(parser.parse_args().card)))
    for one in found:
        note = f", disk at {one.disk_gbps:.1f} GB/s by dd" if one.disk_gbps is not None else ""
        print(
            f"{one.file:<42}{one.name:<26}measured {one.measured:7.3f} s, predicted {one.predicted:7.3f} s "
            f"({one.off_percent:+.1f} %{note})"
        )
    computed = [one for one in found if one.disk_gbps is None]
    near = [one for one in computed if abs(one.off_percent) <= WITHIN_PERCENT]
    print(f"{len(near)} of {len(computed)} within {WITHIN_PERCENT:g} %, those from a disk aside")


if __name__ == "__main__":
    main()
