"""A model's file, opened, and its weights in host memory, which several models may take turns in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..memory.plan.footprint import ModelFootprint
from ..memory.plan.plan import MemoryPlan
from ..memory.stream.pinned import CudaRegistrar, Registrar
from ..sampling.caching.step_cache import StepCache
from ..system.host_memory import return_freed_bytes
from ..transformer.transformer import Block, Transformer
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.stamps import FileStamps
from ..weights.linear.compute import STORED_FP8, select_compute
from ..weights.linear.quantize import quantize_checkpoint
from ..weights.lora.file import LoraChoice, open_loras
from ..weights.lora.names import Aliases
from .fixed_weights import FixedWeights
from .host_weights import HostWeights, WeightParts
from .layer_costs import LayerCosts
from .settings import RunSettings

M = TypeVar("M", bound=Transformer)


class OpenedModel(Generic[M]):
    """One checkpoint's model on the meta device; its weights are in host memory when they are wanted there.

    Opening reads the file's header only; CheckpointError for a file of another kind. `plan` is the one that it was last
    started with.
    """

    parts = WeightParts()
    config: Any  # its family's
    step_cache: StepCache | None = None  # says which passes may be skipped, where a family's model can

    def __init__(
        self,
        path: str | Path,
        settings: RunSettings,
        registrar: Registrar | None = None,
        between_blocks: Callable[[], None] | None = None,
        loras: Sequence[LoraChoice] = (),
    ):
        self.path, self._loras = Path(path), tuple(loras)
        self.config, stored = self.open_file(path)
        self.checkpoint = checkpoint = quantize_checkpoint(stored, settings.quantization, settings.device)
        self.model, self.aliases = self.build(checkpoint), self.lora_aliases(checkpoint)
        self._stamps = FileStamps(stored.tensors.values())
        self.settings, self.between_blocks = settings, between_blocks
        self.model.execution = settings.execution(self.config.head_dim)
        self.blocks: list[Block] = list(self.model.ordered_blocks().values())
        self.costs = LayerCosts(self.model, self.blocks, self.parts)
        self.choose_products(())
        if registrar is None and settings.device.type == "cuda" and settings.pinned_memory:
            registrar = CudaRegistrar(settings.device)
        self.weights = HostWeights(self.model, checkpoint, self.parts, settings, registrar, between_blocks)
        self.fixed = FixedWeights(self.model, self.weights, self.parts, settings.device)
        if loras:
            opened = open_loras(loras, checkpoint.tensors, self.aliases)
            self.weights.attach_loras(opened, [choice.strength for choice in loras])
        self.partners: weakref.WeakSet[OpenedModel[Any]] = weakref.WeakSet()  # see `Turns`
        self.on_yield: weakref.WeakMethod[Callable[[], None]] | None = None  # called when it is stopped for another
        self.in_run = False  # set by what runs it: its host memory is wanted again, also while it is stopped
        self.plan: MemoryPlan | None = None

    # What a family's model says of itself

    def open_file(self, path: str | Path) -> tuple[Any, Checkpoint]:
        """Its dimensions, and its tensors by their own names."""
        raise NotImplementedError

    def build(self, checkpoint: Checkpoint) -> M:
        """The model of `config` on the meta device, every tensor of the dtype that is stored."""
        raise NotImplementedError

    def lora_aliases(self, checkpoint: Checkpoint) -> Aliases:
        """The names that LoRAs may call its layers by."""
        raise NotImplementedError

    def footprint(self, dtype: torch.dtype | None = None) -> ModelFootprint:
        """The model as the planner sees it, from the file's own byte counts; `dtype` is another one to compute in."""
        raise NotImplementedError

    def choose_products(self, beside: Sequence[torch.device]) -> None:
        """Set how its layers multiply, where the choice is ours as these cards, which share its passes, can too."""
        asked, busy = self.settings.quantization, self.costs.busy_modules
        # of auto_fast what it became
        self.quantization = select_compute(self.model, busy, asked, self.settings.device, beside)

    @property
    def computes_in_8_bits(self) -> bool:
        """Whether the user chose products or attention of 8-bit numbers, or of smaller ones."""
        execution = self.model.execution
        by_attention = not execution.attention.exact and not execution.all_queries  # another pack's is nobody's choice
        return self.quantization in ("fp8_fast", "int8", "4bit_fast", STORED_FP8) or by_attention

    def forget_contexts(self) -> None:
        """Free what was made of prompts."""

    @property
    def started(self) -> bool:
        """Whether what the plan says is on its device."""
        raise NotImplementedError

    def stop(self) -> None:
        """Give the device memory back; the weights stay in host memory."""
        raise NotImplementedError

    @property
    def host_bytes(self) -> int:
        return self.weights.host_bytes + self.fixed.host_bytes

    @property
    def pinned_bytes(self) -> int:
        residuals = 0 if self.step_cache is None else self.step_cache.pinned_bytes
        return self.weights.pinned_bytes + residuals + self.fixed.pinned_bytes

    # Taking turns in host memory

    @property
    def idle(self) -> bool:
        """Whether its host memory may go to another model: no run goes on, and it is not all on its device."""
        if self.in_run or self.plan is None or not self.started:
            return not self.in_run
        return self.settings.device.type == "cpu" or self.plan.blocks.num_streamed > 0

    def giver(self) -> OpenedModel[Any] | None:
        """The idle model whose host memory this one would be read over; None where it has its own or none suits."""
        if self.weights.held is not None or self.weights.is_split:
            return None
        others = (other for other in self.partners if other is not self and other.idle)
        return next((other for other in others if self.weights.fits(other.weights)), None)

    def parked_by_idle(self, card: torch.device) -> int:
        """Bytes of a card that `clear_cards` would free."""
        return sum(other.weights.parked_on(card) for other in self.partners if other is not self and other.idle)

    def clear_cards(self) -> None:
        """Have idle models give up what they parked, for this one's blocks; they are read again for their turn."""
        for other in list(self.partners):
            if other is not self and other.idle and other.weights.is_split:
                other.make_way()
                other.weights.release()

    def make_way(self) -> None:
        """Stop for another model, which will take the host memory."""
        self.stop()
        told = None if self.on_yield is None else self.on_yield()
        if told is not None:
            told()

    def _read(self, plan: MemoryPlan) -> None:
        if self.weights.blocks is None:  # the most RAM of a run: nothing of earlier ones should lie beside it
            return_freed_bytes()
        if plan.host.homes is not None:
            self.clear_cards()
        giver = self.giver()
        if giver is not None:
            giver.make_way()
            if plan.host.homes is None and not plan.host.from_disk and self.weights.fits(giver.weights):
                self.weights.take(giver.weights, plan)
                return
            giver.weights.release()  # the plan counts on its memory
        self.weights.read(plan)
