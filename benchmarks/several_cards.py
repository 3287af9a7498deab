"""One pass on one card and on several in the same run: seconds, bits, RAM, and the VRAM of each card.

    python benchmarks/several_cards.py /tmp --out several_cards.json             # all rows, on all GPUs that there are
    python benchmarks/several_cards.py /tmp --twice --out one_card_as_two.json   # one GPU that stands for two
    python benchmarks/several_cards.py /tmp --tiny --out /tmp/tiny.json          # a tiny model on 2 CPU "cards"

Files of random weights are made in the folder where they are missing (14B fp8: 13.5 GiB, FramePack fp8: 12 GiB). All
blocks are streamed, from one copy in pinned RAM. All rows take about 300 s on two H200s, and 120 s more where the files
are missing; each row is written when it is done, and one that fails or takes more than `--limit` seconds is noted, with
what its threads were at, and passed over. `--rows` takes some of them: those that changed since they were last measured
come first.

"staged" rows exchange through pinned RAM, as cards without peer access do. "speed-up" is the median of one card over
that of several; a guided row makes cond and uncond in turn on one card. "bits" says whether the result is that of one
card, bit for bit, or else the relative error. "host" is when all that is asked of the devices has been asked: less than
the pass where the host is ahead. Threads take turns (see `team/mail.py`), "turns" of them in a pass: few where one
thread asks for all blocks. "GIL" is what handing these over takes, a share of the pass: their number times the time of
one between threads that do nothing else, which is less than where each comes after some milliseconds of work. "RAM" is
what the process has beside the blocks, in GiB.

"sparse" rows leave out of self-attention what Sparse Attention's defaults do, in both, from the first step on; "NAG"
rows have a negative prompt that guides attention; "packed" ones exchange in 8 bits, beside one card's exact pass.

One GPU that stands for two (`--twice`, 10 of the 40 blocks, 3.4 GiB, about 100 s) computes all that two would: bits,
memory and the host's work are theirs, speed is not. There a "parked" row has every block in the same card's memory in
place of RAM, elsewhere in the second card's, with 5 GiB of RAM; "parked beside" ones have two share the pass, and the
blocks on the machine's last card where it has more.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from draws import TINY
from lowvram_video.attention.sparse.settings import SparseSettings
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import Frames, History, Prompt
from lowvram_video.framepack.request import EncodedInputs, Sampling
from lowvram_video.framepack.run.generation import prepare, section_size
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.framepack.timed_prompts import parse_timed_prompt
from lowvram_video.memory.plan.footprint import GIB, UNLIMITED
from lowvram_video.memory.plan.parking import Amount, Parking, ParkPlace, parse_parking
from lowvram_video.runtime.run_limits import hold_limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.team.team import Team
from lowvram_video.transformer.nag import NagSettings
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.model import Extras, Nag
from lowvram_video.wanvideo.streamed import StreamedWan
from one_and_several import cards_of, make_parser
from several_rows import ROWS, TINY_ROWS, TWICE_BLOCKS, TWICE_ROWS, Row
from surviving import Rows, is_child, make_all
from synthetic import CONFIGS, write_checkpoint
from torch import Tensor

Pass = Callable[[], Tensor]
Model = StreamedWan | StreamedFramePack
TEXT_TOKENS, IMAGE_TOKENS = 256, 729
PARKED_RAM_GIB = 5.0
SPARSE, NUM_STEPS = SparseSettings(dense_percent=0.0, min_tokens=0), 50
FILE_SECONDS = 240.0  # to make one that is missing, and to read it
PARKED_NAME = "cpu:1"  # stands for any: `started` has the real place
TINY_FRAMEPACK = FramePackConfig(
    num_heads=3, head_dim=128, num_layers=2, num_single_layers=2, text_dim=64, pooled_dim=32, image_dim=48
)


@dataclass(frozen=True)
class Times:
    """Seconds of each pass after one to warm up, and of what the host did in it."""

    seconds: list[float]
    host: list[float]
    result: Tensor

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def timed(make: Pass, rounds: int, cards: Sequence[torch.device]) -> Times:
    """`rounds` passes after one to warm up."""
    seconds, host, result = [], [], make()
    wait_for(cards)
    for _ in range(rounds):
        began = time.perf_counter()
        result = make()
        host.append(time.perf_counter() - began)
        wait_for(cards)
        seconds.append(time.perf_counter() - began)
    return Times(seconds, host, result.float().cpu())


def wan_pass(model: StreamedWan, row: Row) -> Pass:
    """A pass of random inputs, or two: at once where several cards share them, else in turn."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    work = wan_work(config, row.size)
    device = model.settings.device
    latent = torch.randn(1, config.out_channels, *work.latent_size, generator=generator).to(device)
    text = torch.randn(row.samples, config.text_tokens, config.text_dim, generator=generator).to(device)
    timestep = torch.full((row.samples,), 700.0, device=device)
    if row.sparse:
        return sparse_pass(model, lambda: model(latent, timestep, text))
    if row.nag:
        negative = torch.randn(1, config.text_tokens, config.text_dim, generator=generator).to(device)
        extras = Extras(nag=Nag(negative, NagSettings()))
        return lambda: model(latent, timestep, text, extras=extras)
    if model.several is not None or row.samples == 1:
        latents = latent.expand(row.samples, -1, -1, -1, -1).contiguous()
        return lambda: model(latents, timestep, text)
    texts = text.split(1)
    return lambda: torch.cat([model(latent, timestep[:1], each) for each in texts])


def sparse_pass(model: StreamedWan, make: Pass) -> Pass:
    """A pass of the next step of a run each time: what steps before it measured decides what it leaves out."""
    steps = itertools.count()
    model.begin_steps()

    def run() -> Tensor:
        model.at_step(next(steps), NUM_STEPS)
        return make()

    return run


def started(model: Model, row: Row) -> Pass:
    """The model on its cards, all blocks streamed, and a pass of it."""
    if isinstance(model, StreamedFramePack):
        return start_section(model, row)
    limits = hold_limits(model.settings, model.model.execution)
    spec = model.settings.parking
    if (
        spec is not None and PARKED_NAME in spec.cards
    ):  # a list would take this card for the one that computes, as it is
        place = ParkPlace(str(model.settings.device), Amount(), UNLIMITED, limits.h2d_gbps)
        limits = replace(limits, parking=Parking((place,)))
    together = row.samples if model.several is not None else 1
    work = wan_work(model.config, row.size, together, row.samples // together)
    plan = model.make_plan(work, limits)
    if row.packed and model.several is not None:
        plan = replace(plan, model=replace(plan.model, packs_exchange=True))
    model.start_fitting(plan)
    return wan_pass(model, row)


def start_section(
    model: StreamedFramePack, row: Row, text_tokens: int = TEXT_TOKENS, image_tokens: int = IMAGE_TOKENS
) -> Pass:
    """The first step of a section of FramePack with all of its history, of random inputs; the model is started."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    width, height = row.size[0] // 8, row.size[1] // 8

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    prompt = Prompt(randn(1, text_tokens, config.text_dim), randn(1, config.pooled_dim))
    given = EncodedInputs(
        latent_size=(height, width),
        timed=parse_timed_prompt("any"),
        prompts={"any": prompt},
        start=randn(1, config.in_channels, 1, height, width),
        start_features=randn(1, image_tokens, config.image_dim),
    )
    sampling = Sampling(mode=model.mode, cache_threshold=None)
    sections, device = given.sections(sampling), model.settings.device
    work = replace(section_size(sampling, given.latent_size, False), context_tokens=text_tokens + image_tokens)
    plan = model.make_plan(work, hold_limits(model.settings, model.model.execution))
    conditions = prepare(model, plan, sampling, given, sections)
    model.start_fitting(plan)
    indices = sections[0].indices

    def frames(places: Sequence[int]) -> Frames:
        return Frames(randn(1, config.in_channels, len(places), height, width).to(device), torch.tensor(places))

    history = History(*(frames(places) for places in (indices.clean, indices.two, indices.four)))
    noisy, shown = frames(indices.noisy), conditions.images[0]
    image = None if shown is None else shown.to(device)
    return lambda: model(noisy, history, conditions.prompts["any"][0], image)


class Bench:
    """One file's model, read once for all its rows; what one card took is kept for the next row of that work."""

    def __init__(self, path: Path, framepack: bool, cards: Sequence[torch.device], swap: int) -> None:
        self.path, self.cards = path, cards
        self.settings = RunSettings(cards[0], blocks_to_swap=swap)
        self.model: Model = (StreamedFramePack if framepack else StreamedWan)(path, self.settings)
        self.hand_over = hand_over_seconds(cards)
        self._alone: dict[Any, tuple[Times, dict[str, Any]]] = {}

    def measure(self, row: Row) -> dict[str, Any]:
        """One card, then all of them."""
        key = row.size, row.samples, row.sparse, row.nag
        if key not in self._alone:
            self._alone[key] = self._shared(row, ())
        one, of_one = self._alone[key]
        several, of_several = self._parked(row) if row.parked else self._shared(row, tuple(self.cards[1:]))
        error = float((several.result - one.result).norm() / one.result.norm())
        return {
            **asdict(row),
            "cards": len(self.cards),
            "one": of_one,
            "several": of_several,
            "speed_up": one.median / several.median,
            "gil": of_several["turns"] * self.hand_over / several.median,
            "same_bits": one.result.equal(several.result),
            "error": error,
        }

    def _shared(self, row: Row, others: tuple[torch.device, ...]) -> tuple[Times, dict[str, Any]]:
        model = self.model
        model.stop()
        model.settings = replace(self.settings, others=others, staged_exchange=row.staged)
        model.use_cards(others)
        if isinstance(model, StreamedWan):
            model.use_sparse(SPARSE if row.sparse else None)
        return self._timed(row, model)

    def _parked(self, row: Row) -> tuple[Times, dict[str, Any]]:
        """No block fits in the RAM that is left."""
        self.model.stop()
        place = PARKED_NAME if self.cards[0] == self.cards[1] else str(self.cards[1])
        if row.beside and self.cards[0].type == "cuda" and torch.cuda.device_count() > len(set(self.cards)):
            place = f"cuda:{torch.cuda.device_count() - 1}"
        settings = replace(
            self.settings,
            others=tuple(self.cards[1:]) if row.beside else (),
            parking=parse_parking(f"{place},*"),
            ram_budget_gib=PARKED_RAM_GIB,
        )
        model = type(self.model)(self.path, settings)
        try:
            return self._timed(row, model)
        finally:
            model.release()

    def _timed(self, row: Row, model: Model) -> tuple[Times, dict[str, Any]]:
        reset_peaks(self.cards)
        times = timed(started(model, row), row.rounds, self.cards)
        plan = model.plan
        assert plan is not None
        return times, {
            "seconds": times.seconds,
            "host": times.host,
            "vram_gib": peaks(self.cards),
            "planned_gib": plan.denoise.total / GIB,
            "budget_gib": plan.budget_bytes / GIB,
            "exchanged_gb": 0.0 if model.several is None else plan.model.exchanged_bytes(plan.work) / 1e9,
            "streamed": plan.blocks.num_streamed,
            "turns": 0 if model.several is None else model.several.team.mail.num_turns,
            "rss_gib": psutil.Process().memory_info().rss / GIB,
            "host_bytes_gib": model.host_bytes / GIB,
        }


def hand_over_seconds(cards: Sequence[torch.device], count: int = 500) -> float:
    """What it takes to hand a turn to another thread."""
    team = Team(cards[:2])

    def task(rank: int) -> None:
        for _ in range(count):
            team.mail.put(rank, 1 - rank, "turn", None)
            team.mail.take(1 - rank, rank, "turn")

    began = time.perf_counter()
    team.run(task)
    seconds = (time.perf_counter() - began) / team.mail.num_turns
    team.close()
    return seconds


def reset_peaks(cards: Sequence[torch.device]) -> None:
    for card in set(cards):
        if card.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(card)


def peaks(cards: Sequence[torch.device]) -> list[float]:
    """GiB that PyTorch had of each card at most."""
    return [torch.cuda.max_memory_reserved(card) / GIB if card.type == "cuda" else 0.0 for card in cards]


def wait_for(cards: Sequence[torch.device]) -> None:
    for card in cards:
        if card.type == "cuda":
            torch.cuda.synchronize(card)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'row':<20}{'one s':>9}{'several s':>11}{'speed-up':>10}{'wanted':>8}{'bits':>6}{'host s':>9}{'turns':>7}"
        f"{'GIL':>7}{'RAM':>7}"
    ]
    for row in rows:
        one, several = row["one"], row["several"]
        beside = several["rss_gib"] - several["host_bytes_gib"]
        bits = "same" if row["same_bits"] else f"{row['error']:.0e}"
        lines.append(
            f"{row['name']:<20}{statistics.median(one['seconds']):>9.3f}{statistics.median(several['seconds']):>11.3f}"
            f"{row['speed_up']:>9.2f}x{row['wanted']:>8.2f}{bits:>6}"
            f"{statistics.median(several['host']):>9.3f}{several['turns']:>7}{100 * row['gil']:>6.1f}%{beside:>7.2f}"
        )
    return "\n".join(lines)


def file_of(row: Row, options: argparse.Namespace, device: torch.device) -> tuple[Path, int]:
    """The row's file, made where it is missing, and its number of blocks."""
    tiny = {False: TINY["1.3b"], True: TINY_FRAMEPACK}[row.framepack]
    config = tiny if options.tiny else CONFIGS["framepack" if row.framepack else "14b"]
    name = ("tiny_" if options.tiny else "") + ("framepack_fp8" if row.framepack else "fp8")
    if options.twice and not options.tiny:
        config, name = replace(config, num_layers=TWICE_BLOCKS), f"fp8_{TWICE_BLOCKS}"
    path: Path = options.folder / f"{name}.safetensors"
    if not path.exists():
        write_checkpoint(path, config, "fp8", device.type)
    return path, config.num_layers + getattr(config, "num_single_layers", 0)


@torch.inference_mode()
def measure(rows: Sequence[Row], options: argparse.Namespace, cards: Sequence[torch.device]) -> None:
    """In a child: measure these rows, file by file, each written when it is done."""
    done = Rows(options.out)
    for framepack, group in itertools.groupby(rows, lambda row: row.framepack):
        of_file, bench = list(group), None
        for row in of_file:
            with done.watched(row.name, options.limit + (FILE_SECONDS if bench is None else 0)):
                if bench is None:
                    path, num_blocks = file_of(row, options, cards[0])
                    bench = Bench(path, framepack, cards, -1 if options.tiny else num_blocks)
                done.add(bench.measure(row))
                print(table(done.rows[-1:]), flush=True)
        if bench is not None:
            bench.model.release()


def main() -> None:
    parser = make_parser(__doc__, limit_seconds=100.0, separators="commas or semicolons")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    wanted = None if options.rows is None else re.split("[,;]", options.rows)
    of_all = TINY_ROWS if options.tiny else TWICE_ROWS if options.twice else ROWS
    chosen = [row for row in of_all if wanted is None or row.name in wanted]
    if not is_child():
        make_all([row.name for row in chosen], options.out, table)
        return
    measure(chosen, options, cards_of(options))


if __name__ == "__main__":
    main()
