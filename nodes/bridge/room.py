"""What a model may use of each card and of RAM, as ComfyUI's memory is now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...memory.plan.footprint import Limits
from ...memory.plan.host_memory import RAM_MARGIN_BYTES
from ...memory.plan.limits import with_rates
from ...memory.plan.rates import Rates, measure_rates
from ...runtime.opened import OpenedModel
from ...runtime.parked import find_parking
from ...runtime.run_limits import least_limits, run_limits
from ...runtime.streamed import StreamedModel
from ...system.card_links import slowest_link
from ...system.sizes import GIB
from . import host
from .options import StreamOptions

DESKTOP_GB = 0.5  # of a card that is not this machine's

Evictable = Callable[[torch.device], int]  # bytes of a card


def nothing(card: torch.device) -> int:
    """Others keep what they have."""
    return 0


class Room:
    """The limits of one streamed model, whose own memory counts as free."""

    def __init__(self, streamed: StreamedModel[Any]):
        self._streamed = streamed
        self._rates: Rates | None = None

    def limits(self, options: StreamOptions, evictable: Evictable = nothing) -> Limits:
        """What may be used now of each card, with what others will free of it."""
        limits = self._limits(options, self._device)
        cards = self.cards(options)
        each = [limits] * len(cards)
        if self._device.type == "cuda":
            budgets = (self._vram_budget(options, limits.context_bytes, card, evictable) for card in cards)
            limits = replace(limits, link_gbps=slowest_link(cards))
            each = [replace(limits, vram_budget_bytes=budget) for budget in budgets]
        return least_limits([str(card) for card in cards], each)

    def card_limits(self, options: StreamOptions, card_gb: float) -> Limits:
        """What might be used on a card of so many GB, half a GiB of it left to the desktop; ValueError for no more."""
        if card_gb <= DESKTOP_GB:
            raise ValueError(
                f"card_gb is {card_gb:g}, all of which is left to the desktop: give what a card has, such as 8, or 0 "
                "for this machine"
            )
        budget = min(options.vram_budget_gb or card_gb, card_gb - DESKTOP_GB)
        limits = replace(self._limits(options, torch.device("cuda")), vram_budget_bytes=int(budget * GIB))
        names = [str(card) for card in self.cards(options)]
        return least_limits(names, [limits] * len(names))

    def cards(self, options: StreamOptions) -> tuple[torch.device, ...]:
        """All that make a pass."""
        return self._device, *options.others

    def held(self, card: torch.device) -> int:
        """Bytes of weights, and of the ring for them, on one of the model's devices."""
        if card in self._streamed.devices:
            return self._streamed.device_bytes
        return self._streamed.weights.parked_on(card)

    @property
    def _device(self) -> torch.device:
        return self._streamed.settings.device

    def _limits(self, options: StreamOptions, device: torch.device) -> Limits:
        """All but the budget of VRAM."""
        swap = options.blocks_to_swap
        settings = replace(
            self._streamed.settings,
            device=device,
            ram_budget_gib=self._ram_budget(options),
            blocks_to_swap=host.blocks_to_swap(len(self._streamed.blocks)) if swap < 0 else swap,
            prefetch=options.prefetch or None,
        )
        limits = run_limits(settings, self._streamed.model.execution, measure=False)
        may_pin = options.pinned_memory and host.may_pin()
        limits = replace(limits, pinned_cap_bytes=host.pinnable_bytes() + self._holder.pinned_bytes if may_pin else 0)
        if options.parking is not None:
            parking = find_parking(options.parking, self._device, self._free_to_park, options.others)
            limits = replace(limits, parking=parking)
        if limits.card is not None:
            return limits
        if self._rates is None and self._device.type == "cuda":
            self._rates = measure_rates(self._device)
        return with_rates(limits, self._rates)

    def _vram_budget(self, options: StreamOptions, context_bytes: int, card: torch.device, evictable: Evictable) -> int:
        """For the whole process on one card, as plans count it: with the context, which has its memory already."""
        ours = self.held(card) + evictable(card)
        free = host.free_vram(card) + ours - host.reserved_vram() + context_bytes
        if not options.vram_budget_gb:
            return max(0, free)
        others = max(0, torch.cuda.memory_allocated(card) - ours)  # ComfyUI keeps some outside PyTorch
        return max(0, min(int(options.vram_budget_gb * GIB) - others, free))

    def _free_to_park(self, card: torch.device) -> int:
        """Bytes of another card that blocks may have, those included that are there already."""
        held = self._streamed.weights.parked_on(card) + self._streamed.parked_by_idle(card)
        return max(0, host.free_vram(card) + held - host.reserved_vram())

    def _ram_budget(self, options: StreamOptions) -> float | None:
        """GiB; None while all blocks fit in the RAM that is free."""
        free = host.free_ram() + self._holder.host_bytes
        if options.ram_budget_gb:
            return min(options.ram_budget_gb, free / GIB)
        return free / GIB if free < self._streamed.weights.total_bytes + RAM_MARGIN_BYTES else None

    @property
    def _holder(self) -> OpenedModel[Any]:
        """The model that has the host memory that this one would run in."""
        return self._streamed.giver() or self._streamed
