"""A card that a model has memory on beside ComfyUI's own, as ComfyUI's memory management knows it."""

from __future__ import annotations

from typing import Any, NoReturn

import comfy.model_patcher
import torch
from torch import nn

from ...system.sizes import GIB
from . import host
from .engine import Engine


class CardModel(nn.Module):
    """Stands for what an engine has on the card; it has no weights itself."""


class CardPatcher(comfy.model_patcher.ModelPatcher):
    """Counts what the engine holds of the card, and gives it back when ComfyUI wants the room.

    It is an additional model of every MODEL of the engine, so that ComfyUI loads it with them. There is one for a card.
    """

    def __init__(self, engine: Engine[Any], card: torch.device):
        super().__init__(CardModel(), card, host.CPU)
        self.engine = engine

    def clone(self, *args: Any, **kwargs: Any) -> CardPatcher:
        """Itself: a MODEL's clones share the card's memory."""
        return self

    def deepclone_multigpu(self, *arguments: Any, **named: Any) -> NoReturn:
        """ValueError: the engine itself has the cards."""
        raise ValueError("Several GPUs (Low VRAM) has given this MODEL its cards already: take the other node out")

    def model_size(self) -> int:
        """The most that would be held of the card: ComfyUI evicts other models for so much."""
        budget = int(self.engine.options.vram_budget_gb * GIB)
        return min(self.engine.total_bytes, budget) if budget else self.engine.total_bytes

    def loaded_size(self) -> int:
        return self.engine.bytes_on(self.load_device)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Nothing: what goes there is decided by the plan, at the first pass."""
        return 0

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Free the card; the next pass plans anew for what is left then."""
        freed = self.loaded_size()
        self.engine.give_back(self.load_device)
        return freed - self.loaded_size()

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.engine.give_back(self.load_device)

    def unpin_all_weights(self) -> None:
        """Nothing: the MODEL's own patcher unpins."""


def card_patchers(engine: Engine[Any], cards: tuple[torch.device, ...]) -> list[CardPatcher]:
    """Those of all these cards but ComfyUI's own, the same ones again while anything holds them."""
    found = []
    for card in dict.fromkeys(cards):
        if card != engine.device:
            patcher = engine.card_patchers.get(card)
            if not isinstance(patcher, CardPatcher):
                patcher = engine.card_patchers[card] = CardPatcher(engine, card)
            found.append(patcher)
    return found
