"""How one MODEL of the graph may use the machine; it travels with the MODEL and never changes another one's."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ...attention.sparse.settings import SparseSettings
from ...compilation.settings import CompileSettings
from ...memory.plan.parking import ParkSpec
from ...sampling.caching.settings import StepCacheSettings
from ...system.card_links import numbered


@dataclass(frozen=True)
class StreamOptions:
    """The settings of Block Swap, Torch Compile, Sparse Attention, Step Cache and Several GPUs, as widgets have them.

    `blocks_to_swap` -1 is planned; `vram_budget_gb` 0 is what is free less ComfyUI's reserve; `prefetch` 0 is planned;
    `ram_budget_gb` 0 is what is free. `others` are the cards that share each pass with ComfyUI's own, `parking` says
    which hold blocks for it.
    """

    blocks_to_swap: int = -1
    vram_budget_gb: float = 0.0
    prefetch: int = 0
    ram_budget_gb: float = 0.0
    pinned_memory: bool = True
    compile: CompileSettings | None = None
    sparse: SparseSettings | None = None
    step_cache: StepCacheSettings | None = None
    others: tuple[torch.device, ...] = ()
    parking: ParkSpec | None = None

    def differences(self, other: StreamOptions) -> set[str]:
        """The names of the settings that are not the other's."""
        return {field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)}

    def same_host_memory(self, other: StreamOptions) -> bool:
        """Whether weights in host memory may stay as they are."""
        budgets = [(each.ram_budget_gb, each.pinned_memory, each.parking) for each in (self, other)]
        return budgets[0] == budgets[1]

    @property
    def cards(self) -> tuple[torch.device, ...]:
        """All cards beside ComfyUI's own that have memory of the model."""
        parked = () if self.parking is None else self.parking.cards
        return tuple(dict.fromkeys((*self.others, *(numbered(torch.device(name)) for name in parked))))
