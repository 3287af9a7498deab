"""What a step of each model takes on the card, per VRAM budget: what its plan says of the measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..memory.plan.footprint import UNLIMITED, Limits, ModelFootprint
from ..memory.plan.limits import with_card
from ..memory.plan.plan import MemoryPlan, PlanError, plan_memory
from ..memory.stream.pinned import default_pinned_cap
from ..system.card_profile import CardProfile, StepRow
from ..system.host_memory import total_ram_bytes
from ..system.sizes import GIB
from .models import PublishedModel

BUDGETS_GIB = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
NOT_MEASURED = "products or attention were not measured"


def predicted_steps(
    card: CardProfile, models: Sequence[PublishedModel], attention: str, fused: bool
) -> Iterator[StepRow]:
    """One row for each model and budget up to the card's memory, on a CPU one for each model."""
    for model in models:
        footprint = replace(model.footprint(), attention=attention)
        for budget in budgets_of(card):
            yield _predicted(model, footprint, _limits(card, budget, fused))


def budgets_of(card: CardProfile) -> tuple[float | None, ...]:
    """Usual budgets that the card has, and all of it; None on a CPU."""
    if not card.card.capability:
        return (None,)
    whole = int(card.memory_bytes / GIB * 2) / 2
    return (*(budget for budget in BUDGETS_GIB if budget < whole), whole)


def _limits(card: CardProfile, budget: float | None, fused: bool) -> Limits:
    ram = total_ram_bytes()
    if budget is None:
        return with_card(Limits(UNLIMITED, context_bytes=0, ram_budget_bytes=ram, fused=fused), card)
    limits = Limits(int(budget * GIB), ram_budget_bytes=ram, pinned_cap_bytes=default_pinned_cap(), fused=fused)
    return with_card(limits, card)


def _predicted(model: PublishedModel, footprint: ModelFootprint, limits: Limits) -> StepRow:
    work, whole = model.work, limits.vram_budget_bytes >= UNLIMITED
    row = StepRow(
        model.title, model.form, work.width, work.height, work.frames,
        None if whole else limits.vram_budget_bytes / GIB, footprint.num_blocks,
    )  # fmt: skip
    try:
        plan = plan_memory(footprint, work, limits)
    except PlanError as refusal:
        least, ram = refusal.smallest_budget_bytes, refusal.smallest_ram_bytes
        wanted = f"{ram / GIB:g} GiB of RAM" if least is None and ram is not None else f"{(least or 0) / GIB:g} GiB"
        return replace(row, problem=f"needs {wanted}")
    return replace(row, problem=NOT_MEASURED) if not plan.times_are_measured else _timed(row, plan)


def _timed(row: StepRow, plan: MemoryPlan) -> StepRow:
    return replace(
        row,
        num_streamed=plan.blocks.num_streamed,
        seconds=round(plan.times.total, 4),
        compute_seconds=round(plan.times.compute, 4),
        transfer_seconds=round(plan.times.transfer, 4),
    )
