"""What nodes show as text beside plans that fit: refusals, parked blocks, reports, LoRAs, Doctor, runs that go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lowvram_video.attention.sparse.readings import LayerReading
from lowvram_video.compilation.blocks import at_limit
from lowvram_video.compilation.counts import Counts
from lowvram_video.compilation.profiles import PROFILES, VideoMemory, settings_of
from lowvram_video.compilation.reading import CompileReading, regressions
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.doctor.comfyui_checks import FLAGS, check_comfyui
from lowvram_video.doctor.finding import Finding, Findings
from lowvram_video.doctor.installed import Installed
from lowvram_video.doctor.kernel_checks import NAMES, check_kernels
from lowvram_video.doctor.memory_checks import check_memory
from lowvram_video.doctor.system_checks import check_system
from lowvram_video.doctor.trials import Outcome
from lowvram_video.memory.plan.footprint import GIB, CardBudget
from lowvram_video.memory.plan.parking import Amount, Parking, ParkPlace
from lowvram_video.memory.plan.plan import PlanError, plan_memory
from lowvram_video.memory.plan.table import describe
from lowvram_video.memory.report.report import CardReport, PhaseReport, RunReport
from lowvram_video.memory.report.stream_log import ParkedReport
from lowvram_video.runtime.several import plan_shared
from lowvram_video.runtime.status_texts import (
    PHASES,
    PREPARING,
    decoding,
    loading,
    loading_for,
    section_step,
    sections_done,
)
from lowvram_video.sampling.caching.moments import Moment
from lowvram_video.sampling.caching.settings import FEW_STEPS, METHODS, StepCacheSettings
from lowvram_video.sampling.caching.step_cache import CacheReading, StepCache
from lowvram_video.sampling.caching.tables import CacheTable, MagTable, TeaTable
from lowvram_video.weights.lora.report import LoraReport

from .test_doctor import LINUX, WINDOWS
from .test_plan import FP8, LONG_480P, limits


def refusals() -> list[str]:
    """What would fit: in VRAM, in RAM, by hand, and on several cards."""
    by_hand = limits(8, blocks_to_swap=0), limits(8, blocks_to_swap=99)
    slow_link = limits(12, link_gbps=0.001, cards=two_cards(12))
    asked: list[Callable[[], object]] = [
        partial(plan_memory, FP8, LONG_480P, limits(1)),
        partial(plan_memory, FP8, LONG_480P, limits(4, ram_budget_bytes=2**20)),
        partial(plan_shared, FP8, LONG_480P, slow_link, 2),
        *(partial(plan_memory, FP8, LONG_480P, each) for each in by_hand),
    ]
    return [refused(ask) for ask in asked]


def refused(ask: Callable[[], object]) -> str:
    try:
        ask()
    except PlanError as error:
        return str(error)
    raise AssertionError("this fits")


def two_cards(gib: float) -> tuple[CardBudget, ...]:
    return tuple(CardBudget(f"cuda:{index}", int(gib * GIB)) for index in range(2))


def plans_of_several_cards() -> list[str]:
    """Passes that are shared, and blocks that are parked."""
    work = replace(LONG_480P, cards=2)
    shared = [limits(8, cards=two_cards(8), link_gbps=link) for link in (None, 20.0)]
    places = [ParkPlace("cuda:1", Amount(), free, 8.0, staged) for free, staged in product((0, 4 * GIB), (True, False))]
    parked = [limits(gib, parking=Parking((place,)), ram_budget_bytes=3 * GIB) for place in places for gib in (4, 60)]
    return [
        *(describe(plan_memory(replace(FP8, packs_exchange=True), work, each)) for each in shared),
        *(describe(plan_memory(FP8, LONG_480P, each)) for each in parked),
    ]


def reports() -> list[str]:
    """Everything that a report may have a line for."""
    phases = tuple(PhaseReport(name, 0.0, 1.0, GIB, GIB, GIB, GIB) for name in ("encode", "denoise", "decode"))
    layers = tuple(LayerReading(step, 0, step > 0, 0.1, 0.5, 0.1, 0.1) for step in range(2))
    parked = tuple(
        ParkedReport("cuda:1", blocks, GIB, GIB, gbps, other)
        for blocks, gbps, other in ((1, 0.0, 0.0), (2, 8.0, 0.0), (3, 8.0, 6.0), (4, 6.0, 8.0))
    )
    cards = (CardReport("cuda:1", GIB, GIB),)
    return [
        RunReport(
            phases,
            attention=layers,
            cards=cards,
            parked=parked,
            step_caches=step_caches(),
            compiling=compiling(),
        ).table()
    ]


def step_caches() -> tuple[CacheReading, ...]:
    """Of every method, with each kind of table; kept in either memory, with nothing skipped, and off."""
    tea, mag = TeaTable((1.0, 0.0), 0.1), MagTable((1.0, 1.0), (1.0, 1.0), 0.1)
    known = [
        CacheTable("Wan 2.1 1.3B", tea, mag, verified, file)
        for verified, file in ((True, "a"), (False, "a"), (False, ""))
    ]
    labels = [
        str(StepCache(StepCacheSettings(method, max_skips=skips), table))
        for method, table, skips in product(METHODS, known, (0, 3))
    ]
    skipped = ((0, 2, 0), (1, 2, 2), (2, 2, 1))
    few = StepCache(StepCacheSettings(), known[0])
    few.at(Moment(0.0, 1.0, FEW_STEPS, 0))
    return (
        *(CacheReading(label, skipped, GIB, in_ram=place) for label, place in product(labels, (True, False))),
        CacheReading(labels[0], skipped[:1]),
        few.reading(),
    )


def compiling() -> tuple[CompileReading, ...]:
    """Every profile, code that was made, kept or found, and what is worse than before."""
    own = CompileSettings(mode="max-autotune", dynamic=False)
    memories = [VideoMemory(int(free * GIB), total * GIB) for free, total in ((30, 40), (15, 16), (8, 8), (2, 24))]
    settings = [settings_of(profile, own, memory) for profile, memory in product(PROFILES, memories)]
    worse = regressions(figures(30.0, 3, 0.5), figures(10.0, 1, 0.1)) + regressions(
        figures(30.0, 0, 0.1), figures(9.0, 0, 0.1)
    )
    cached = [Counts(1, 1, 1, 1, bypasses) for bypasses in (0, 2)]
    return (
        *(CompileReading(str(each), notes=each.notes) for each in [*settings, CompileSettings()]),
        *(
            CompileReading("profile low: inductor, code for any size", 1.0, counts, saved_bytes=saved, vram_after=GIB)
            for counts, saved in product(cached, (0, GIB))
        ),
        CompileReading("profile low: cudagraphs, code for any size", regressions=worse),
        CompileReading("profile low: inductor, code for any size", plain=at_limit(own), unmade=("expected 4",)),
    )


def figures(seconds: float, again: int, pass_seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "rows": 8,
        "pass_seconds": pass_seconds,
        "again": again,
        "breaks": again,
        "misses": again,
    }


def loras() -> list[str]:
    """All of a LoRA applied, and what was left out of another."""
    left = {
        "a": "the model has no such layer", "b": "the model has no such layer", "c": "the model has no bias there",
        "d": "not known as a part of a LoRA", "e": "its layer has a LoRA of another kind", "f": "half of a pair",
        "g": "b is the same", "h": "b changes the same", "i": "another size: [4], the model has [8]",
        **{f"more.{index}": "the model has no such layer" for index in range(9)},
    }  # fmt: skip
    return [str(LoraReport(Path("style.safetensors"), 20, skipped, "")) for skipped in ({}, left)]


def statuses() -> list[str]:
    """What is said of a run while it goes on."""
    read = [loading(GIB, merges) for merges in (True, False)]
    sections = [section_step(1, 5, 7, 25), decoding(1, 5), decoding(0, 0), sections_done(5)]
    return [PREPARING, *PHASES.values(), *read, *(loading_for(each, 3.4) for each in read), *sections]


def examinations() -> list[str]:
    """What Doctor says of machines that have everything, little and nothing."""
    old = replace(LINUX, python=(3, 9, 1), torch="2.3.0+cpu", cuda=None)
    others = replace(WINDOWS, torch="2.3.0+cu121", cuda="12.1"), replace(LINUX, platform="darwin")
    flags = {flag.removeprefix("--").replace("-", "_"): True for flag in FLAGS}
    found = [finding for here in (LINUX, WINDOWS, old, *others) for finding in examined(here)]
    found += [*check_comfyui("0.33.0", flags), *check_comfyui("", {})]
    good = Findings(tuple(each for each in found if each.state == "good"))
    return [
        Findings(tuple(found)).text(),
        good.text(),
        Findings(tuple(each for each in found if not each.stops)).text(),
    ]


def examined(here: Installed) -> list[Finding]:
    cpu = torch.device("cpu")
    outcomes = [
        Outcome("missing", "is not installed"),
        Outcome("broken", "is installed, but misses x", "x"),
        Outcome("broken", "takes the process with it, which ended by signal 11"),
        Outcome("untried", "is installed; not run, as there is no NVIDIA GPU"),
        Outcome("works", "agrees with plain attention"),
        Outcome("works", "compiles and runs kernels"),
        Outcome("works", "its int8 layer is right"),
    ]
    kernels = [each for outcome in outcomes for each in check_kernels(here, cpu, dict.fromkeys(NAMES, outcome))]
    return [*check_system(here, cpu), *check_memory(here, cpu, None), *kernels]
