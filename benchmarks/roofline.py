"""What a step could take on other cards at best: a roofline by arithmetic, no measurement and no promise.

    python benchmarks/roofline.py --out roofline.json

Assumptions, all of them in sight: products and attention at the whole dense rate that the card's maker publishes (with
fp32 sums, which GeForce cards run at half the rate of fp16 ones); nothing else takes time; blocks stream at the given
rate of a 16-lane slot, behind compute; sparse attention computes `DENSITY` of the blocks in 8 bits, q against k at the
rate of int8 and weights against v at that too, and one mean per block for all others. Real cards stay below: the last
line says by how much the measured H200 does, against its own roofline.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lowvram_video.memory.plan.footprint import ModelFootprint, WorkSize
from lowvram_video.system.atomic_files import write_file
from preset_plans import wan_footprint

DENSITY = 0.15
BLOCK = 64
WORKS = {"480x832x81": WorkSize(81, 480, 832), "720x1280x81": WorkSize(81, 720, 1280)}
MEASURED = Path(__file__).parent / "results" / "sparse_step_h200_2026-11-29.json"


@dataclass(frozen=True)
class Card:
    """Published dense rates, TFLOP/s or TOP/s: bf16 and fp8 with fp32 sums, int8; and GB/s of its slot."""

    name: str
    bf16: float
    fp8: float
    int8: float
    bus_gbps: float


# NVIDIA's white papers on Ampere GA102, Ada, Blackwell (RTX) and Hopper; no fp8 before Ada: products are bf16 there
CARDS = (
    Card("RTX 3060 12 GB", 25.6, 25.6, 102.0, 25),
    Card("RTX 4070 12 GB", 58.3, 116.6, 233.0, 25),
    Card("RTX 4090 24 GB", 165.2, 330.3, 660.6, 25),
    Card("RTX 5090 32 GB", 209.5, 419.0, 838.0, 50),
    Card("H200", 989.5, 1979.0, 1979.0, 55),
)


@dataclass(frozen=True)
class Bound:
    """Seconds of a step that no card of these rates goes below."""

    card: str
    work: str
    exact: float
    fp8_fast: float
    sparse: float
    stream: float


def bound(model: ModelFootprint, card: Card, name: str, work: WorkSize) -> Bound:
    """A pass of one sample, all blocks streamed."""
    products, attention = model.pass_flops(work, False)
    stream = sum(model.block_bytes) / card.bus_gbps / 1e9
    of_bf16, of_fp8 = products / card.bf16 / 1e12, products / card.fp8 / 1e12
    dense = attention / card.bf16 / 1e12
    sparse = attention * (DENSITY + (1 - DENSITY) / BLOCK) / card.int8 / 1e12
    seconds = (of_bf16 + dense, of_fp8 + dense, of_fp8 + sparse)
    return Bound(card.name, name, *(max(each, stream) for each in seconds), stream)


def measured() -> dict[str, tuple[float, float]]:
    """`{work: (dense, sparse)}`: what fp8_fast steps took on the H200."""
    parts = json.loads(MEASURED.read_text(encoding="utf-8"))["parts"]
    found = {}
    for work, part in zip(WORKS, ("wan 480p", "wan 720p"), strict=True):
        steps = {row["name"]: row["step"] for row in parts[part]}
        found[work] = steps["dense"], steps["sparse top-k 0.15"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = wan_footprint("Wan 14B fp8", 5120, 13824, 40, 40, 1.0)
    rows = [bound(model, card, name, work) for card in CARDS for name, work in WORKS.items()]
    if options.out is not None:
        found = {"cards": [asdict(card) for card in CARDS], "density": DENSITY, "rows": [asdict(row) for row in rows]}
        write_file(options.out, json.dumps(found, indent=1).encode())
    print("Roofline, not measured: seconds of a Wan 14B step at the makers' rates, blocks streamed from RAM")
    print(f"{'card':<18}{'work':<14}{'exact':>9}{'fp8_fast':>10}{'sparse':>9}{'stream':>9}")
    for row in rows:
        print(f"{row.card:<18}{row.work:<14}{row.exact:>9.2f}{row.fp8_fast:>10.2f}{row.sparse:>9.2f}{row.stream:>9.2f}")
    for work, (dense, sparse) in measured().items():
        best = next(row for row in rows if (row.card, row.work) == ("H200", work))
        print(f"measured on an H200, {work}: {dense / best.fp8_fast:.1f} x dense, {sparse / best.sparse:.1f} x sparse")


if __name__ == "__main__":
    main()
