"""README's table of cards: what is streamed of each model, with Triton and without: python benchmarks/card_table.py

With --write it replaces the table between the marks in README.md and its translations. The
plans are those of `lowvram-video plan`, of the published models' dimensions; half a GiB of each card is left to the
desktop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowvram_video.card.models import (
    FIVE,
    FORMS,
    LARGE,
    SMALL,
    PublishedModel,
    imagined_checkpoint,
    published_models,
)
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel
from lowvram_video.memory.plan.footprint import GIB, Limits, ModelFootprint
from lowvram_video.memory.plan.plan import PlanError, plan_memory
from lowvram_video.wanvideo.network.model import WanModel

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- cards: python benchmarks/card_table.py --write -->\n", "<!-- end of cards -->")
CARDS_GB = (4, 6, 8, 12, 16, 24)
DESKTOP_BYTES = GIB // 2
RAM_BESIDE_FILE = 1.5  # GiB, of the process with PyTorch; see benchmarks/results/streaming_rss_h200_2026-11-21.json
NOT_SHOWN = ("fp8 with fp8_fast",)  # forms that take what fp8 takes
FITS, NOT = "0", "–"
CONFIGS = {"Wan 2.1 1.3B": SMALL, "Wan 2.2 TI2V 5B": FIVE, "Wan 2.1 14B": LARGE}


@dataclass(frozen=True)
class Words:
    """What the table says in a language; `frames` and `section` follow a size."""

    readme: str
    card: str
    all_blocks: str
    ram: str
    frames: str
    section: str


LANGUAGES = {
    "en": Words("README.md", "card", "blocks in all", "RAM", ", {} frames", ", a section"),
    "zh": Words("README.zh.md", "显存", "总块数", "内存", "，{} 帧", "，一段"),
    "ja": Words("README.ja.md", "VRAM", "全ブロック数", "RAM", "、{} フレーム", "、1 セクション"),
}


def card_table(language: str = "en") -> str:
    """The table in Markdown: blocks streamed with Triton and without, and the RAM that the model then takes."""
    words = LANGUAGES[language]
    columns = _columns()
    rows = [(words.card, *(_title(column.model, words) for column in columns)), ("---",) * (1 + len(columns))]
    rows += [(f"{card} GB", *(column.cells[index] for column in columns)) for index, card in enumerate(CARDS_GB)]
    rows.append((words.all_blocks, *(str(column.num_blocks) for column in columns)))
    rows.append((words.ram, *(column.ram for column in columns)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@dataclass(frozen=True)
class Column:
    """A model: a cell for each card, such as `14 / 26`, streamed blocks with Triton and without."""

    model: PublishedModel
    cells: tuple[str, ...]
    num_blocks: int
    ram: str


@cache
def _columns() -> tuple[Column, ...]:
    models = [model for model in published_models() if model.form not in NOT_SHOWN and "expert" not in model.title]
    return tuple(map(_column, models))


def _column(model: PublishedModel) -> Column:
    footprint = model.footprint()
    cells = tuple(_cell(model, footprint, card) for card in CARDS_GB)
    return Column(model, cells, footprint.num_blocks, f"{_file_bytes(model) / GIB + RAM_BESIDE_FILE:.0f} GiB")


def _title(model: PublishedModel, words: Words) -> str:
    work = model.work
    length = words.section if model.title == "FramePack" else words.frames.format(work.frames)
    return f"{model.title} {model.form}<br>{work.width}×{work.height}{length}"


def _cell(model: PublishedModel, footprint: ModelFootprint, card_gb: int) -> str:
    """One figure where Triton makes no difference."""
    told = list(_streamed(model, footprint, card_gb))
    return told[0] if told[0] == told[1] else " / ".join(told)


def _streamed(model: PublishedModel, footprint: ModelFootprint, card_gb: int) -> Iterator[str]:
    for fused in (True, False):
        try:
            plan = plan_memory(footprint, model.work, Limits(card_gb * GIB - DESKTOP_BYTES, fused=fused))
            yield str(plan.blocks.num_streamed) if plan.blocks.num_streamed else FITS
        except PlanError:
            yield NOT


def _file_bytes(model: PublishedModel) -> int:
    config = CONFIGS.get(model.title)
    network = FramePackModel(FramePackConfig(), device="meta") if config is None else WanModel(config, device="meta")
    tensors = imagined_checkpoint(network, FORMS[model.form][0]).tensors
    return sum(info.nbytes for info in tensors.values())


def write_tables() -> None:
    """Put them between the marks of each README."""
    for language, words in LANGUAGES.items():
        readme = ROOT / words.readme
        before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
        _, mark, after = rest.partition(MARKS[1])
        assert mark, f"{readme} lacks {MARKS}"
        readme.write_text(f"{before}{MARKS[0]}{card_table(language)}{MARKS[1]}{after}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into README.md and its translations")
    is_written = parser.parse_args().write
    print(card_table())
    if is_written:
        write_tables()
