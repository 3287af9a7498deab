"""What a run may use of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..memory.plan.footprint import CardBudget, Limits
from ..memory.plan.limits import hold_budget, limits_for
from ..system.card_links import slowest_link
from ..system.host_memory import available_ram_bytes
from ..system.sizes import GIB
from ..transformer.execution import Execution
from .parked import FreeOn, find_parking, free_for_parking
from .settings import RunSettings


def hold_limits(settings: RunSettings, execution: Execution, held_bytes: int = 0) -> Limits:
    """A run's limits by its settings and what is free now, of VRAM and of RAM, `held_bytes` of which its models have.

    From here on PyTorch's allocator holds the VRAM budget.
    """
    if settings.ram_budget_gib is None:  # what a model already holds there is not wanted again
        settings = replace(settings, ram_budget_gib=(available_ram_bytes() + held_bytes) / GIB)
    each = [run_limits(alone, execution) for alone in on_each_card(settings)]
    limits = least_limits([str(device) for device in settings.cards], each)
    for device in settings.cards:
        hold_budget(device, limits)
    return replace(limits, link_gbps=slowest_link(settings.cards, settings.staged_exchange))


def on_each_card(settings: RunSettings) -> list[RunSettings]:
    """The same settings for each of the cards, the others beside it."""
    cards = settings.cards
    return [
        replace(settings, device=card, others=(*cards[:index], *cards[index + 1 :])) for index, card in enumerate(cards)
    ]


def least_limits(names: Sequence[str], each: Sequence[Limits]) -> Limits:
    """The limits of one plan that every card of these names and limits follows."""
    least = min(each, key=lambda one: one.vram_budget_bytes)
    if len(each) == 1:
        return least
    budgets = (limits.vram_budget_bytes for limits in each)
    return replace(least, cards=tuple(CardBudget(*card) for card in zip(names, budgets, strict=True)))


def run_limits(
    settings: RunSettings, execution: Execution, measure: bool = True, free_on: FreeOn = free_for_parking
) -> Limits:
    """The limits of a model that runs with these settings and backends; `measure` as in `limits_for`.

    `free_on` tells what blocks may have of a card on which they are parked.
    """
    limits = limits_for(
        settings.device,
        vram_budget_gib=settings.vram_budget_gib,
        ram_budget_gib=settings.ram_budget_gib,
        blocks_to_swap=settings.blocks_to_swap,
        num_slots=None if settings.prefetch is None else settings.prefetch + 1,
        fused=execution.ops.name != "eager",
        attention=execution.attention.workspace if execution.watch is None else execution.watch.workspace,
        measure=measure,
    )
    if settings.parking is not None:
        limits = replace(limits, parking=find_parking(settings.parking, settings.device, free_on, settings.others))
    return limits if settings.pinned_memory else replace(limits, pinned_cap_bytes=0)
