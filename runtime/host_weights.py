"""A model's weights in host memory, or read from the disk as it runs; what LoRAs are attached; nothing of a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..memory.plan.host_memory import MIN_STAGING
from ..memory.plan.parking import Homes
from ..memory.plan.plan import MemoryPlan
from ..memory.stream.disk_blocks import DiskBlocks
from ..memory.stream.host_blocks import HostBlocks
from ..memory.stream.layout import BlockLayout, layout_block
from ..memory.stream.parked_blocks import ParkedBlocks
from ..memory.stream.pinned import PinnedBudget, Registrar
from ..memory.stream.scratch_file import ScratchFile
from ..memory.stream.shared_blocks import SharedBlocks, SharedParked
from ..memory.stream.split_blocks import Home, HomeOf, SplitBlocks
from ..system.card_links import numbered, reaches
from ..system.device_errors import is_out_of_memory
from ..system.sizes import in_gib
from ..transformer.transformer import Transformer
from ..weights.files.checkpoint import Checkpoint, Source, read_tensor
from ..weights.linear.quantize import QuantizedSource
from ..weights.lora.attach import AttachedLoras
from ..weights.lora.file import Lora
from .settings import RunSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightParts:
    """How a family's tensors are treated, by how their names begin (within their block where they have one).

    `optional` ones of a block make what can be kept in their place, `unstreamed` ones stay on the device. Outside the
    blocks, `transient` modules are needed for a moment before them in each pass, those `in_pieces` some rows of a layer
    at a time, and `per_run` ones once in each run.
    """

    optional: tuple[str, ...] = ()
    unstreamed: tuple[str, ...] = ()
    transient: tuple[str, ...] = ()
    in_pieces: tuple[str, ...] = ()
    per_run: tuple[str, ...] = ()


class HostWeights:
    """One checkpoint's weights. Nothing is in memory before `read`; `release` gives it back.

    `source` is what is read: the file's tensors, with LoRAs beside some of them or merged into them. `blocks` holds
    the blocks between `read` and `release`. `model` is on the meta device and gets LoRAs' tensors as parameters.
    Pinned memory comes from `registrar`; without one nothing is pinned. `check` is called while much is read and may
    raise.
    """

    def __init__(
        self,
        model: Transformer,
        checkpoint: Checkpoint,
        parts: WeightParts,
        settings: RunSettings,
        registrar: Registrar | None,
        check: Callable[[], None] | None,
    ):
        self.checkpoint, self.parts = checkpoint, parts
        self.blocks: HostBlocks | DiskBlocks | SharedBlocks | SplitBlocks | None = None
        self.scratch_file: ScratchFile | None = None
        self.budget: PinnedBudget | None = None  # of everything that is pinned between `read` and `release`
        self._model, self._settings = model, settings
        self._registrar, self._check = registrar, check
        self.source: Source = checkpoint
        self.layouts: list[BlockLayout] = []
        self._put_on((), (), checkpoint)

    @property
    def largest_block_bytes(self) -> int:
        return max(layout.nbytes for layout in self.layouts)

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.source.tensors.values())

    @property
    def host_bytes(self) -> int:
        return 0 if self.blocks is None else self.blocks.host_bytes

    @property
    def pinned_bytes(self) -> int:
        return 0 if self.blocks is None else self.blocks.pinned_bytes

    def fixed_names(self) -> list[str]:
        """Parameters outside what is streamed."""
        streamed = {f"{layout.prefix}.{place.name}" for layout in self.layouts for place in layout.places}
        return [name for name in self._model.state_dict() if name not in streamed]

    def read(self, plan: MemoryPlan) -> None:
        """Bring the blocks into host memory (or get ready to read them from disk); calling it again does nothing.

        What host memory holds stays there; what was read from the disk moves there when the plan has room for it.
        """
        cap = plan.limits.pinned_cap_bytes
        if (plan.host.homes is None) == isinstance(self.blocks, SplitBlocks):  # parked, or no more
            self.release()
        if isinstance(self.blocks, DiskBlocks) and not plan.host.from_disk:
            self.release()
        if plan.host.homes is not None:
            self._find_homes(plan, plan.host.homes)
            return
        if self.blocks is not None:
            self._pin_more(cap)
            return
        self.budget = self._budget_of(plan)
        if plan.host.from_disk:
            self.blocks = self._open_disk(self.layouts, plan.host.num_staging)
        else:
            pin = _streamed(plan)
            self.blocks = HostBlocks(self.source, self.layouts, self.budget, pin=pin, check=self._check)

    def _find_homes(self, plan: MemoryPlan, homes: Homes) -> None:
        """Have every block that has no home in the one that was planned; a card that has no room after all is left."""
        if not isinstance(self.blocks, SplitBlocks):
            self.budget, self.blocks = self._budget_of(plan), SplitBlocks(self.layouts)
        blocks = self.blocks
        homeless = set(blocks.homeless)
        ram, disk = homeless & set(homes.ram), homeless & set(homes.disk)
        try:
            for name, numbers in homes.cards:
                parked = homeless & set(numbers)
                if not self._park(blocks, parked, numbered(torch.device(name))):
                    (ram if plan.limits.ram_budget_bytes is None else disk).update(parked)
            pin = [place for place, index in enumerate(sorted(ram)) if index not in plan.blocks.resident]
            blocks.settle(ram, lambda layouts: HostBlocks(self.source, layouts, self.budget, pin, check=self._check))
            blocks.settle(disk, self._open_disk)
        except BaseException:  # an interrupt too
            self.release()
            raise

    def _park(self, blocks: SplitBlocks, numbers: Collection[int], card: torch.device) -> bool:
        """Have these blocks on a card; False where it has no room."""
        staged = not reaches(self._settings.device, card)

        def park(layouts: Sequence[BlockLayout]) -> ParkedBlocks:
            return ParkedBlocks(self.source, layouts, card, staged, self.budget, self._check)

        try:
            blocks.settle(numbers, park)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("%s has no room for the blocks that were to be parked there: they stay here", card)
            return False
        return True

    def _open_disk(self, layouts: Sequence[BlockLayout], num_staging: int = MIN_STAGING) -> DiskBlocks:
        self._check_disk(layouts)
        if self.scratch_file is None:
            self.scratch_file = ScratchFile(self.source, layouts, self.checkpoint.path.parent, self._check)
        return DiskBlocks(self.scratch_file, layouts, self.budget, num_staging)

    @property
    def is_split(self) -> bool:
        """Whether blocks have different homes."""
        return isinstance(self.blocks, SplitBlocks)

    @property
    def extents(self) -> Sequence[Tensor] | None:
        """The blocks in RAM, where all of them are there."""
        return None if self.blocks is None else self.blocks.extents

    def parked_on(self, card: torch.device) -> int:
        """Bytes of blocks in the memory of another card."""
        return sum(parked.parked_bytes for parked in self._parked() if parked.card == card)

    def unpark(self, card: torch.device) -> None:
        """Give a card back what is parked there; the model must be stopped. `read` finds these blocks another home."""
        for parked in self._parked():
            if parked.card == card and isinstance(self.blocks, SplitBlocks):
                self.blocks.leave(parked)

    @property
    def homes(self) -> Sequence[HomeOf]:
        """Where the blocks lie, if not all in one place."""
        return self.blocks.homes if isinstance(self.blocks, SplitBlocks) else ()

    def _parked(self) -> list[ParkedBlocks]:
        return [home.source for home in self.homes if isinstance(home.source, ParkedBlocks)]

    @property
    def held(self) -> HostBlocks | None:
        """The blocks, where host memory holds all of them."""
        return self.blocks if isinstance(self.blocks, HostBlocks) else None

    def fits(self, other: HostWeights) -> bool:
        """Whether these weights can be read over those of another model that host memory holds."""
        same_device = self._settings.device == other._settings.device
        return other.held is not None and same_device and self.layouts == other.layouts

    def take(self, other: HostWeights, plan: MemoryPlan) -> None:
        """`read` over another model's host memory, which it gives up; pinned memory stays pinned.

        Both models must be stopped and fit. Where reading fails or is interrupted, neither has any.
        """
        self.release()
        blocks, budget = other.held, other.budget
        assert blocks is not None
        other.blocks = other.budget = None
        self.blocks = blocks
        try:
            self.budget = self._budget_of(plan)
            if self.budget is None:
                blocks.unpin()
            elif budget is not None:  # it counts what is pinned
                budget.cap_bytes = self.budget.cap_bytes
                self.budget = budget
            blocks.budget = self.budget
            blocks.retry_pinning()
            blocks.refill(self.source, self._check, _streamed(plan))
        except BaseException:  # an interrupt too leaves them half read
            self.release()
            raise

    def share(self, other: HostWeights) -> None:
        """Have the blocks of the same model in the memory of another, where that holds them: RAM, or cards' own.

        Between this and `release` the other must keep them as they are. What it reads from the disk is read here too.
        """
        self.release()
        if other.held is not None:
            self.blocks, self.budget = SharedBlocks(other.held), other.budget
        elif other.is_split:
            blocks = SplitBlocks(self.layouts)
            self.blocks, self.budget = blocks, other.budget
            for home in other.homes:
                blocks.settle(home.blocks, partial(self._share_home, home.source))

    def _share_home(self, home: Home, layouts: Sequence[BlockLayout]) -> Home:
        if isinstance(home, ParkedBlocks):
            return SharedParked(home, staged=not reaches(self._settings.device, home.card))
        return SharedBlocks(home) if isinstance(home, HostBlocks) else self._open_disk(layouts)

    def read_tensor(self, name: str) -> Tensor:
        """One tensor in its stored form, in memory of its own."""
        return read_tensor(self.source, name)

    def unpin(self) -> None:
        """Give pinned memory back and keep the bytes; the model must be stopped."""
        if isinstance(self.blocks, (HostBlocks, SplitBlocks)):
            self.blocks.unpin()

    def release(self) -> None:
        """Give all memory back; calling it again does nothing. The model must be stopped."""
        blocks, self.blocks = self.blocks, None
        if blocks is not None:
            blocks.release()
        scratch_file, self.scratch_file = self.scratch_file, None
        if scratch_file is not None:
            scratch_file.close()

    def set_lora_strengths(self, strengths: Sequence[float]) -> bool:
        """Other strengths, one per LoRA; True where some are merged: their bytes are another source's, to be read.

        The model must be stopped where some are.
        """
        self.loras.set_strengths(strengths)
        if self.loras.are_merged:
            self._adopt(self.loras.source())
        return self.loras.are_merged

    def attach_loras(self, loras: Sequence[Lora], strengths: Sequence[float], origin: Source | None = None) -> None:
        """Have these LoRAs in place of those there are; the model must be stopped.

        `origin` holds its tensors where they are not the file's. Host memory stays, and is read again, where every
        tensor keeps its place.
        """
        before = self.layouts
        self.loras.detach()
        self._put_on(loras, strengths, origin or self.checkpoint)
        if not isinstance(self.blocks, HostBlocks) or before != self.layouts:
            self.release()
            return
        try:
            self.blocks.refill(self.source, self._check)
        except BaseException:  # an interrupt too leaves them half read
            self.release()
            raise

    @property
    def attached(self) -> tuple[Sequence[Lora], Sequence[float], Source]:
        """The LoRAs there are, their strengths, and whose tensors they change: what `attach_loras` takes."""
        return self.loras.loras, self.loras.strengths, self.loras.origin

    def _put_on(self, loras: Sequence[Lora], strengths: Sequence[float], origin: Source) -> None:
        dtype = self._model.execution.dtype
        self.loras = AttachedLoras(self._model, origin, loras, strengths, dtype, self._settings.lora_mode)
        self._adopt(self.loras.source() if loras else origin)

    def _adopt(self, source: Source) -> None:
        """Read from this source from now on."""
        self.source = source
        self.loras.adopt(source.tensors)
        self.layouts = []
        for prefix, block in self._model.ordered_blocks().items():
            names = [name for name in block.state_dict() if not name.startswith(self.parts.unstreamed)]
            optional = {name for name in names if name.startswith(self.parts.optional)}
            self.layouts.append(layout_block(self.source, prefix, names, optional, block.stages))

    def _budget_of(self, plan: MemoryPlan) -> PinnedBudget | None:
        # a cap of 0 is memory that shall not be pinned: none refuses it, so none warns
        cap = plan.limits.pinned_cap_bytes
        return None if self._registrar is None or cap == 0 else PinnedBudget(self._registrar, cap)

    def _pin_more(self, cap: int | None) -> None:
        """Ask for more pinned memory where there may be more than when the budget was made."""
        budget = self.budget
        if isinstance(self.blocks, HostBlocks) and budget is not None and cap is not None and cap > budget.cap_bytes:
            budget.cap_bytes = cap
            self.blocks.retry_pinning()

    def _check_disk(self, layouts: Sequence[BlockLayout]) -> None:
        path = self.checkpoint.path
        logger.warning(
            "%s is read from the disk as it runs, which is slower: it has %s, more than the RAM budget or "
            "what is free of RAM", path.name, in_gib(sum(each.nbytes for each in layouts)),
        )  # fmt: skip
        if isinstance(self.checkpoint, QuantizedSource):
            raise ValueError(
                f"{path.name} cannot be quantised to {self._settings.quantization} and streamed "
                "from disk at once: the quantised bytes are in no file. Convert it first (lowvram-video convert), "
                "or raise the RAM budget"
            )


def _streamed(plan: MemoryPlan) -> list[int]:
    """The blocks that stream under this plan: those worth pinning."""
    return [index for index in range(plan.blocks.num_blocks) if index not in plan.blocks.resident]
