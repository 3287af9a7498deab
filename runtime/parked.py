"""Parking on this machine: which of a list's cards there are, what is free there, and how fast blocks come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..memory.plan.footprint import UNLIMITED
from ..memory.plan.limits import RESERVE_BYTES
from ..memory.plan.parking import RAM, Amount, Parking, ParkPlace, ParkSpec
from ..system.card_links import measured_gbps, numbered, reaches
from .settings import find_device

FreeOn = Callable[[torch.device], int]


def find_parking(spec: ParkSpec, device: torch.device, free_on: FreeOn, others: Sequence[torch.device] = ()) -> Parking:
    """The places of a list for a model that computes on `device`, and on `others` that share its passes.

    What the list gives one of these is what stays on each. ValueError for a card that this machine has not.
    """
    computing = [numbered(each) for each in (device, *others)]
    cards, stay = [], Amount()
    for name in spec.cards:
        amount, card = spec.amount(name), numbered(find_device(name))
        assert amount is not None
        if card in computing:
            stay = Amount(min(stay.num_bytes, amount.num_bytes), min(stay.share, amount.share))
            continue
        staged = not all(reaches(each, card) for each in computing)
        gbps = min(measured_gbps(each, card, staged) for each in computing) / len(computing)  # all copy from it
        cards.append(ParkPlace(name, amount, free_on(card), gbps, staged))
    return Parking(tuple(cards), spec.amount(RAM) or Amount(), stay)


def free_for_parking(card: torch.device) -> int:
    """Bytes of a card that blocks may have, of what is free and of what PyTorch has of it here."""
    if card.type != "cuda":
        return UNLIMITED
    free, _ = torch.cuda.mem_get_info(card)
    return max(0, free + torch.cuda.memory_reserved(card) - RESERVE_BYTES)
