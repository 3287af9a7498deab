"""What P cards would be worth, by arithmetic with every assumption in sight: seconds of a pass for P = 1, 2, 4 and 8.

    python benchmarks/card_scaling.py --out card_scaling.json

Assumptions: products and attention reach the given rates whatever a card's share of rows and heads is; blocks stream
in each pass over a bus that each card has for itself, while the machine's RAM gives all of them `ram_gbps` together;
attention goes by those groups of heads that a model takes (`team/hiding.py`), of which the first one's exchange and the
last one's way back are seen, and the rest hides behind attention where that takes longer.

Corrected by what two H200s took (`several_cards_two_h200_2026-11-30.json`): 623 and 584 TFLOP/s are what one card's
passes fit within 2.2 %. Two cards took longer than half of one's measured time and the exchange: 1.2 % of that (less of
everything at a time, and copies) and `sync_ms` = 1.4 ms a block (waiting for each other), by 720x1280x81 and
480x832x81 from card to card. 480x832x17 was none of these: predicted are 0.264 s, and 0.246 measured.
`host_ms` is what the host takes for a block and card where one thread asks two cards (`host_h200_2026-11-30.json`): a
pass takes at least P times as long.
None of this was measured on more than two cards: `benchmarks/several_cards.py` measures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lowvram_video.memory.plan.footprint import ModelFootprint, WorkSize
from lowvram_video.system.atomic_files import write_file
from lowvram_video.team.hiding import GROUP_SECONDS, HeadTimes, hiding_sizes, seen_seconds
from preset_plans import wan_footprint

COUNTS = (1, 2, 4, 8)
WORKS = {
    "480x832x81": WorkSize(81, 480, 832),
    "720x1280x81": WorkSize(81, 720, 1280),
    "480x832x17": WorkSize(17, 480, 832),
}


@dataclass(frozen=True)
class Machine:
    """Rates: TFLOP/s of a card, GB/s of its bus, of the way between two cards for each, and of the machine's RAM."""

    name: str
    products: float
    attention: float
    bus_gbps: float
    link_gbps: float
    ram_gbps: float
    loss: float = 0.012
    sync_ms: float = 1.4
    host_ms: float = 2.22


MACHINES = (
    Machine("24 GB GeForce, PCIe 4, through RAM", 160, 140, 25, 12, 80),
    Machine("24 GB GeForce, PCIe 5, through RAM", 160, 140, 50, 25, 160),
    Machine("data centre, PCIe 5, card to card", 623, 584, 55, 45, 300),
    Machine("data centre, NVLink", 623, 584, 55, 390, 300),
)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a pass and of its parts; `seen` is what of the exchange hides behind nothing."""

    machine: str
    work: str
    cards: int
    compute: float
    stream: float
    seen: float
    total: float


def predict(model: ModelFootprint, machine: Machine, work: WorkSize, name: str, cards: int) -> Prediction:
    """A pass of one sample by so many cards."""
    products, attention = (flops / cards for flops in model.pass_flops(work, False))
    products_s, attention_s = products / machine.products / 1e12, attention / machine.attention / 1e12
    bus = min(machine.bus_gbps, machine.ram_gbps / cards)
    stream = sum(model.block_bytes) / bus / 1e9
    rows = work.tokens / cards
    exchanged = model.num_blocks * 4 * rows * model.dim * model.compute_bytes * (cards - 1) / cards
    exchange = exchanged / machine.link_gbps / 1e9
    compute = products_s + attention_s
    seen = 0.0
    if cards > 1:
        compute *= 1 + machine.loss
        num_heads = -(-model.num_heads // cards)
        times = HeadTimes.of(exchange, attention_s, num_heads * model.num_blocks)
        sizes = hiding_sizes(num_heads, times, work.tokens, num_heads)
        further = (len(sizes) - 1) * GROUP_SECONDS
        seen = model.num_blocks * (seen_seconds(sizes, times) + further + machine.sync_ms / 1e3)
    host = model.num_blocks * cards * machine.host_ms / 1e3
    return Prediction(machine.name, name, cards, compute, stream, seen, max(compute + seen, stream, host))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = wan_footprint("Wan 14B fp8", 5120, 13824, 40, 40, 1.0)
    rows = [
        predict(model, machine, work, name, cards)
        for machine in MACHINES
        for name, work in WORKS.items()
        for cards in COUNTS
    ]
    if options.out is not None:
        found = {"machines": [asdict(each) for each in MACHINES], "rows": [asdict(row) for row in rows]}
        write_file(options.out, json.dumps(found, indent=1).encode())
    print(f"{'machine':<38}{'work':<14}{'cards':>6}{'compute':>9}{'stream':>9}{'seen':>8}{'pass s':>9}{'speed-up':>10}")
    alone: dict[tuple[str, str], float] = {}
    for row in rows:
        one = alone.setdefault((row.machine, row.work), row.total)
        print(
            f"{row.machine:<38}{row.work:<14}{row.cards:>6}{row.compute:>9.2f}{row.stream:>9.2f}{row.seen:>8.2f}"
            f"{row.total:>9.2f}{one / row.total:>9.2f}x"
        )


if __name__ == "__main__":
    main()
