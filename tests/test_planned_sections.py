"""The plan of a FramePack section against what its pass really allocates, counted without computing it."""

from __future__ import annotations

from pathlib import Path

import pytest
from lowvram_video.memory.plan.footprint import MIB
from lowvram_video.memory.plan.plan import plan_memory

from .dry_framepack import Section, bytes_of_section, opened
from .dry_pass import DrySage

SECTIONS = [
    Section("fp8", (640, 608), 1.85),
    Section("fp8", (640, 608), 2.1),
    Section("fp8", (640, 608), 1.75, "fp8_fast"),
    Section("fp8", (640, 608), 4),
    Section("fp8", (640, 608), 12, streamed=False),
    Section("fp8", (640, 608), 4, "fp8_fast"),
    Section("fp8", (640, 608), 4, attention=DrySage()),
    Section("fp8", (640, 608), 4, rank=8),
    Section("fp8", (640, 608), 4, guided=True),
    Section("fp8", (640, 608), 2.0, "fp8_fast", guided=True),
    Section("bf16", (960, 544), 3.5),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_a_pass_over_a_section_takes_what_was_planned(section: Section, files: Path) -> None:
    model = opened(section, files)
    plan = plan_memory(model.footprint(), section.work, section.limits)
    counted, denoise = bytes_of_section(model, plan), plan.denoise
    planned = denoise.activations + denoise.scratch + denoise.text + denoise.latents
    print(f"{section}: {planned / MIB:.0f} MiB planned, {counted / MIB:.0f} counted, {plan.choice}")
    assert counted <= planned, f"{(counted - planned) / MIB:.1f} MiB more than planned, by {plan.choice}"
    assert planned <= counted + 0.05 * denoise.total, f"{(planned - counted) / MIB:.1f} MiB less, by {plan.choice}"
