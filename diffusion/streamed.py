"""A transformer on a device that need not hold it: weights where the plan says, blocks streamed while they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ..host_memory import allocate_bytes
from ..memory.disk_blocks import DiskBlocks
from ..memory.footprint import DENSE_CHUNK_TENSORS, QUANTIZED_CHUNK_TENSORS, Limits, ModelFootprint, WorkSize
from ..memory.host_buffers import CudaRegistrar, HostBlocks, PinnedBudget
from ..memory.lanes import Span, TimedLanes, lanes_for
from ..memory.layout import BlockLayout, Part, TensorSource, layout_block
from ..memory.lender import Lender
from ..memory.pinned import Registrar
from ..memory.plan import MemoryPlan, PlanError, plan_leaner, plan_memory
from ..memory.ring import DeviceRing
from ..memory.spool import Spool
from ..memory.streamer import BlockStreamer
from ..weights.compute import select_compute
from ..weights.linear import Linear
from ..weights.lora import Lora, LoraChoice, open_loras
from ..weights.lora_names import Aliases
from ..weights.lora_source import AttachedLoras
from ..weights.merged_source import Source as WeightSource
from ..weights.quantize import QuantizedSource
from ..weights.reader import Checkpoint
from .settings import RunSettings
from .transformer import Block, Transformer, here_already

logger = logging.getLogger(__name__)

GIB = 2**30
NUM_READERS = 8  # threads

M = TypeVar("M", bound=Transformer)
T = TypeVar("T")


class StreamedModel(Generic[M]):
    """One checkpoint's model with its host memory, its plan and, between `start` and `stop`, its device memory.

    `model` is on the meta device, `aliases` are the names that LoRAs may call its layers by (see `Aliases`).
    """

    # Modules that are needed for a moment before the blocks only, so they can share bytes with what comes later.
    lendable: tuple[str, ...] = ()
    # Modules that are needed once per run, before `start`: see `preparing`.
    once: tuple[str, ...] = ()

    def __init__(
        self,
        model: M,
        checkpoint: Checkpoint,
        settings: RunSettings,
        head_dim: int,
        aliases: Aliases,
        registrar: Registrar | None = None,
        between_blocks: Callable[[], None] | None = None,
        loras: Sequence[LoraChoice] = (),
    ):
        self.model, self.checkpoint, self.settings = model, checkpoint, settings
        self.between_blocks = between_blocks
        self.aliases = aliases
        self.compiled = False  # whether the blocks run as compiled code
        self.model.execution = settings.execution(head_dim)
        self.blocks: list[Block] = list(self.model.ordered_blocks().values())
        busy = [module for block in self.blocks for module in block.busy_modules()]
        select_compute(self.model, busy, settings.quantization, settings.device)
        self.loras = AttachedLoras(
            self.model,
            self.checkpoint,
            open_loras(loras, self.checkpoint.tensors, aliases),
            [choice.strength for choice in loras],
            self.model.execution.dtype,
            settings.lora_mode,
        )
        # what is read: the file's tensors, perhaps with LoRAs beside them or merged into them
        self.weights: TensorSource = self.loras.source() if loras else self.checkpoint
        self.layouts = self._lay_out()
        self.limits: Limits | None = None
        self.plan: MemoryPlan | None = None
        self.source: HostBlocks | DiskBlocks | None = None
        self.spool: Spool | None = None
        self.streamer: BlockStreamer | None = None
        self.lender: Lender | None = None
        self.ring: DeviceRing | None = None
        self._budget: PinnedBudget | None = None  # for everything that is pinned between `read` and `release`
        self._timed_since = 0.0
        self._registrar = registrar
        if registrar is None and settings.device.type == "cuda" and settings.pinned_memory:
            self._registrar = CudaRegistrar(settings.device)

    # What a model says of itself

    def footprint(self, dtype: torch.dtype | None = None) -> ModelFootprint:
        """The model as the planner sees it, from the file's own byte counts; `dtype` is another one to compute in."""
        raise NotImplementedError

    def chunk_tensors(self, dtype: torch.dtype, ffn_dim: int, dim: int) -> float:
        """See `ModelFootprint`; compiled code makes products in a tensor of their own and copies them."""
        busy = [module for block in self.blocks for module in block.busy_modules()]
        layers = [layer for module in busy for layer in module.modules() if isinstance(layer, Linear)]
        dense = all(layer.is_dense(dtype) for layer in layers)
        tensors = DENSE_CHUNK_TENSORS if dense else QUANTIZED_CHUNK_TENSORS
        return tensors + (ffn_dim / dim if self.compiled else 0.0)

    def optional_names(self, names: Sequence[str]) -> set[str]:
        """Those of a block's tensors that a pass can do without, once what they make has been made (`visit`)."""
        return set()

    def streamed_names(self, block: Block) -> list[str]:
        """A block's tensors that travel with it; the others stay on the device."""
        return list(block.state_dict())

    def forget_contexts(self) -> None:
        """Free what was made of prompts."""

    def make_plan(self, work: WorkSize, limits: Limits) -> MemoryPlan:
        """The plan for this work; PlanError names what would fit where this does not."""
        self.limits = limits
        plan = plan_memory(self.footprint(), work, limits)
        if plan.from_disk and limits.ram_is_the_device and limits.blocks_to_swap < 0:
            # no block is resident for free
            self.limits = replace(limits, blocks_to_swap=len(self.layouts))
            plan = plan_memory(self.footprint(), work, self.limits)
        return plan

    def read(self, plan: MemoryPlan) -> None:
        """Bring the blocks into host memory (or get ready to read them from disk); again is harmless.

        What host memory holds stays there; what was read from the disk moves there when the plan has room for it.
        """
        if isinstance(self.source, DiskBlocks) and not plan.from_disk:
            self.release()
        if self.source is not None:
            if isinstance(self.source, HostBlocks) and self._budget is not None and self._raise_cap(self._budget):
                self.source.retry_pinning()
            return
        budget = self._budget = self._pinned_budget()
        if plan.from_disk:
            logger.warning(
                "%s is read from the disk as it runs, which is slower: it has %.2f GiB, more than the RAM budget or "
                "what is free of RAM", self.checkpoint.path.name, sum(each.nbytes for each in self.layouts) / GIB,
            )  # fmt: skip
            if isinstance(self.checkpoint, QuantizedSource):
                raise ValueError(
                    f"{self.checkpoint.path.name} cannot be quantised to {self.settings.quantization} and streamed "
                    "from disk at once: the quantised bytes are in no file. Convert it first (lowvram-video convert), "
                    "or raise the RAM budget"
                )
            self.spool = Spool(self.weights, self.layouts, self.checkpoint.path.parent)
            self.source = DiskBlocks(self.spool, self.layouts, budget, plan.num_staging)
        else:
            streamed = [index for index in range(plan.num_blocks) if index not in plan.resident_blocks]
            self.source = HostBlocks(self.weights, self.layouts, budget, pin=streamed, check=self.between_blocks)

    def _raise_cap(self, budget: PinnedBudget) -> bool:
        """Whether more may be pinned than when the budget was made; it then has the new cap."""
        cap = self.limits.pinned_cap_bytes if self.limits else None
        if cap is None or cap <= budget.cap_bytes:
            return False
        budget.cap_bytes = cap
        return True

    def _pinned_budget(self) -> PinnedBudget | None:
        if self._registrar is None or not self.settings.pinned_memory:
            return None
        return PinnedBudget(self._registrar, self.limits.pinned_cap_bytes if self.limits else None)

    def start(self, plan: MemoryPlan, ring: DeviceRing | None = None) -> None:
        """Put the model on its device as the plan says. `ring` is one shared with another expert of the same layout."""
        self.stop()
        self.read(plan)
        assert self.source is not None
        self.plan = plan
        try:
            self._load_fixed(plan)
            self.loras.place(self.settings.device)
            part = Part.STREAM if plan.cache_text_kv or self.once else Part.ALL
            self.ring = ring or self._make_ring(plan)
            self._timed_since = time.perf_counter()
            self.streamer = BlockStreamer(
                [self.blocks],
                self.source,
                self.settings.device,
                ring=self.ring,
                resident=plan.resident_blocks,
                part=part,
                between_blocks=self.between_blocks,
            )
            self.streamer.load()
        except BaseException:
            self.stop()
            raise
        self.model.stream = self.streamer
        self.model.execution = replace(self.model.execution, token_chunk=plan.token_chunk, head_groups=plan.head_groups)

    def stop(self) -> None:
        """Give the device memory back; the weights stay in host memory. Again is harmless."""
        self.model.stream = iter
        self.model.lend = here_already
        lender, self.lender = self.lender, None
        if lender is not None:
            lender.release()
        self.forget_contexts()
        streamer, self.streamer, self.ring = self.streamer, None, None
        if streamer is not None:
            streamer.unload()
        self._unload(self._fixed_names())

    def release(self) -> None:
        """Give device and host memory back."""
        self.stop()
        source, self.source = self.source, None
        if source is not None:
            source.release()
        spool, self.spool = self.spool, None
        if spool is not None:
            spool.close()

    def set_lora_strengths(self, strengths: Sequence[float]) -> None:
        """Other strengths, one per LoRA; nothing is read again but what LoRAs are merged into."""
        self.forget_contexts()  # LoRAs change them too
        self.loras.set_strengths(strengths)
        if self.loras.are_merged:
            self.release()
            self.weights = self.loras.source()

    def attach_loras(
        self, loras: Sequence[Lora], strengths: Sequence[float], source: WeightSource | None = None
    ) -> None:
        """Have these LoRAs on the model, which is stopped for it, in place of those it has.

        `source` holds its tensors where they are not the file's. Host memory stays, and is read again, where every
        tensor keeps its place.
        """
        self.stop()
        self.loras.detach()
        source = source or self.checkpoint
        dtype, mode = self.model.execution.dtype, self.settings.lora_mode
        self.loras = AttachedLoras(self.model, source, loras, strengths, dtype, mode)
        self.weights = self.loras.source() if loras else source
        before, self.layouts = self.layouts, self._lay_out()
        if not isinstance(self.source, HostBlocks) or before != self.layouts:
            self.release()
            return
        try:
            self.source.refill(self.weights, self.between_blocks)
        except BaseException:  # an interrupt too leaves them half read
            self.release()
            raise

    def spans(self) -> tuple[list[Span], float]:
        """What the timed lanes did since the last call, and how many seconds ago their clock began."""
        if self.ring is None or not isinstance(self.ring.lanes, TimedLanes):
            return [], 0.0
        return self.ring.lanes.spans(), time.perf_counter() - self._timed_since

    @property
    def started(self) -> bool:
        return self.streamer is not None

    @property
    def device_bytes(self) -> int:
        """Bytes of weights, and of the ring for them, on the device; 0 unless started."""
        if self.plan is None or not self.started:
            return 0
        memory = self.plan.denoise
        return memory.fixed_weights + memory.residents + memory.ring

    @property
    def largest_block_bytes(self) -> int:
        return max(layout.nbytes for layout in self.layouts)

    @property
    def host_bytes(self) -> int:
        return 0 if self.source is None else self.source.host_bytes

    @property
    def pinned_bytes(self) -> int:
        lent = 0 if self.lender is None else self.lender.pinned_bytes
        return lent + (0 if self.source is None else self.source.pinned_bytes)

    def _lay_out(self) -> list[BlockLayout]:
        layouts = []
        for prefix, block in self.model.ordered_blocks().items():
            names = self.streamed_names(block)
            layouts.append(layout_block(self.weights, prefix, names, self.optional_names(names)))
        return layouts

    @contextmanager
    def preparing(self, plan: MemoryPlan) -> Iterator[None]:
        """The modules of `once` on the device, and `visit` at hand, for what is made once per run.

        The model is stopped for it, so that this memory and that of a pass are not wanted at the same time.
        """
        self.stop()
        self.read(plan)
        names = [name for name in self._fixed_names() if name.startswith(self.once)]
        try:
            self._load(names)
            self.loras.place(self.settings.device)
            yield
        finally:
            self._unload(names)

    def visit(self, make: Callable[[Block], T]) -> list[T]:
        """What `make` makes of each block in a pass with only its optional weights; they then stay at home."""
        assert self.source is not None
        sizes = [layout.part_bytes(Part.OPTIONAL) for layout in self.layouts]
        device = self.settings.device
        in_place = device.type == "cpu" and isinstance(self.source, HostBlocks)
        visitor = BlockStreamer(
            [self.blocks], self.source, device, ring=None if in_place else DeviceRing(2 * max(sizes), device),
            part=Part.OPTIONAL, between_blocks=self.between_blocks,
        )  # fmt: skip
        try:
            visitor.load()
            made = [make(cast(Block, block)) for block in visitor(self.blocks)]
        finally:
            visitor.unload()
            if self.streamer is not None:  # both read from one source: what was prefetched is asked for again
                self.streamer.lose_ring()
        return made

    def start_fitting(self, plan: MemoryPlan) -> None:
        """`start`; when the device runs out of memory meanwhile, with a leaner plan."""
        self.stop()
        self.retrying(lambda: None if self.started else self.start(plan))

    def retrying(self, run: Callable[[], T]) -> T:
        """A pass; when the device runs out of memory, also while starting anew, it is repeated with a leaner plan."""
        leaner: MemoryPlan | None = None
        while True:
            try:
                if leaner is not None:
                    self.start(leaner)
                return run()
            except torch.cuda.OutOfMemoryError:
                leaner = self._leaner_plan()
                if leaner is None:
                    raise
            # outside the handler: its traceback holds the failed pass's activations
            self.stop()
            torch.cuda.empty_cache()

    def _leaner_plan(self) -> MemoryPlan | None:
        if self.plan is None or self.limits is None:
            return None
        try:
            leaner = plan_leaner(self.footprint(), self.limits, self.plan)
        except PlanError:
            return None
        logger.warning(
            "out of VRAM under a plan of %.2f GiB: the pass is repeated with one of %.2f GiB; no step is lost",
            self.plan.predicted_denoise_bytes / GIB,
            leaner.predicted_denoise_bytes / GIB,
        )
        return leaner

    def _make_ring(self, plan: MemoryPlan) -> DeviceRing | None:
        if self.settings.device.type == "cpu" and not plan.from_disk:
            return None  # the blocks run where they lie
        return DeviceRing(plan.ring_bytes, self.settings.device, lanes_for(self.settings.device, self.settings.timed))

    def _fixed_names(self) -> list[str]:
        """Parameters outside what is streamed."""
        streamed = {f"{layout.prefix}.{place.name}" for layout in self.layouts for place in layout.places}
        return [name for name in self.model.state_dict() if name not in streamed]

    def _load_fixed(self, plan: MemoryPlan) -> None:
        device = self.settings.device
        lent = self.lendable if plan.lend_fixed and device.type != "cpu" else ()
        if lent:
            self._lend(lent)
        self._load([name for name in self._fixed_names() if not name.startswith(lent + self.once)])

    def _lend(self, names: Sequence[str]) -> None:
        modules = {name: module for name in names if (module := getattr(self.model, name)) is not None}
        self.lender = Lender(self.weights, modules, self.settings.device, self._budget)
        self.model.lend = self.lender

    def _load(self, names: Sequence[str]) -> None:
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for name, tensor in zip(names, readers.map(self._read, names), strict=True):
                self._assign(name, tensor.to(self.settings.device))

    def _unload(self, names: Sequence[str]) -> None:
        for name in names:
            info = self.weights.tensors[name]
            self._assign(name, torch.empty(info.shape, dtype=info.dtype, device="meta"))

    def _read(self, name: str) -> Tensor:
        info = self.weights.tensors[name]
        raw = allocate_bytes(info.nbytes)
        self.weights.read_into(name, raw)
        return raw.view(info.dtype).view(info.shape)

    def _assign(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor, requires_grad=False))
