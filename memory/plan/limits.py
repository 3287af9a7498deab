"""What a run may use on this machine: its budgets as the user gave them, or what is free."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ...system.card_links import numbered
from ...system.card_profile import H2D_PAGEABLE, H2D_PINNED, CardProfile, profile_of
from ...system.processors import processors_of
from ..stream.pinned import default_pinned_cap
from .attention_bytes import AttentionBytes
from .footprint import CONTEXT_BYTES, GIB, UNLIMITED, Limits
from .rates import Rates, measure_rates

logger = logging.getLogger(__name__)

CONTEXT_PROCESSORS = 132  # of the card on which `CONTEXT_BYTES` were measured
RESERVE_BYTES = GIB // 2  # left to the desktop when the budget is what is free


def limits_for(
    device: torch.device,
    *,
    vram_budget_gib: float | None = None,
    ram_budget_gib: float | None = None,
    blocks_to_swap: int = -1,
    num_slots: int | None = None,
    fused: bool = False,
    attention: AttentionBytes | None = None,
    measure: bool = True,
) -> Limits:
    """The limits for `device`; on a CPU only RAM counts.

    Rates are those of the card's profile where it has one. `measure` times them where it has none; without it a GPU
    that need not be here is assumed, and a budget is needed.
    """
    ram = None if ram_budget_gib is None else int(ram_budget_gib * GIB)
    if device.type != "cuda":
        return Limits(UNLIMITED, context_bytes=0, ram_budget_bytes=ram, blocks_to_swap=blocks_to_swap, fused=fused)
    limits = Limits(
        0 if vram_budget_gib is None else int(vram_budget_gib * GIB),
        ram_budget_bytes=ram,
        pinned_cap_bytes=default_pinned_cap(),
        blocks_to_swap=blocks_to_swap,
        num_slots=num_slots,
        fused=fused,
        attention=attention,
    )
    limits = replace(with_card(limits, profile_of(device)), context_bytes=context_bound(device))
    if not measure:
        return limits
    if limits.card is None:
        limits = with_rates(limits, measure_rates(device))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if vram_budget_gib is not None:
        if limits.vram_budget_bytes > total:
            logger.warning("a VRAM budget of %g GiB: this card has %.2f GiB", vram_budget_gib, total / GIB)
        return replace(limits, vram_budget_bytes=min(total, limits.vram_budget_bytes))
    # what is free, and the context that this process has already
    return replace(limits, vram_budget_bytes=min(total, free + limits.context_bytes) - RESERVE_BYTES)


def context_bound(device: torch.device) -> int:
    """The most that a process has of a card outside PyTorch's allocator, tables of pinned memory apart.

    The driver keeps memory for all threads that a card runs at a time, beside the libraries' code: what was measured on
    an H200 holds for cards of as many multiprocessors, which are all GeForce ones but the RTX 5090 (170), or of fewer.
    """
    processors = processors_of(device) or CONTEXT_PROCESSORS
    return int(CONTEXT_BYTES * max(1.0, processors / CONTEXT_PROCESSORS))


def with_rates(limits: Limits, rates: Rates | None) -> Limits:
    """The same limits on a device that is as fast as was measured; None: as fast as they assume."""
    return limits if rates is None else replace(limits, **vars(rates))


def with_card(limits: Limits, card: CardProfile | None) -> Limits:
    """The same limits on a card that was measured; None: as they are. What a profile lacks stays as it was."""
    if card is None:
        return limits
    disk = [row.gbps for row in card.disk if row.gbps]
    return replace(
        limits,
        card=card,
        h2d_gbps=card.gbps(H2D_PINNED) or limits.h2d_gbps,
        pageable_gbps=card.gbps(H2D_PAGEABLE) or limits.pageable_gbps,
        disk_gbps=disk[0] if disk else limits.disk_gbps,
    )


def hold_budget(device: torch.device, limits: Limits) -> None:
    """Make PyTorch's allocator refuse what would break the budget, so that a pass is retried instead of spilling."""
    if device.type != "cuda":
        return
    hold_allocator(device, max(0, limits.vram_budget_bytes - limits.context_bytes))


def hold_allocator(device: torch.device, allowed_bytes: int | None) -> None:
    """Have PyTorch's allocator refuse more than so many bytes of a GPU; None: nothing is refused any more."""
    number, share = numbered(device).index, 1.0  # it takes no "cuda"
    if allowed_bytes is not None:
        share = min(1.0, allowed_bytes / torch.cuda.get_device_properties(number).total_memory)
    torch.cuda.set_per_process_memory_fraction(share, number)
