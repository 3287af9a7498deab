"""A transformer on a device that need not hold it: weights where the plan says, blocks streamed while they run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch

from ..attention.backend import AttentionSpec
from ..attention.select import select_attention
from ..compilation.blocks import dynamo_limits
from ..compilation.code import CompiledCode, check_compiling
from ..compilation.settings import CompileSettings
from ..memory.plan.footprint import Limits, WorkSize
from ..memory.plan.plan import MemoryPlan, PlanError, plan_leaner
from ..memory.stream.host_blocks import HostBlocks
from ..memory.stream.layout import Part
from ..memory.stream.parked_blocks import ParkedBlocks
from ..memory.stream.pinned import Registrar
from ..memory.stream.ring import DeviceRing
from ..memory.stream.streamer import BlockStreamer
from ..memory.stream.streams import SpanSink, streams_for
from ..system.device_errors import is_out_of_memory
from ..system.sizes import in_gib
from ..transformer.transformer import Block
from ..transformer.workspace import all_there
from ..weights.files.checkpoint import Source
from ..weights.linear.compute import AUTO_FAST
from ..weights.lora.file import Lora, LoraChoice
from .attending import AttendingModel
from .opened import M
from .settings import RunSettings
from .several import Several, plan_shared

logger = logging.getLogger(__name__)


class Parked(NamedTuple):
    """Blocks in another card's memory: how many, their bytes, and their places in a pass (see `Span`)."""

    card: str
    num_blocks: int
    parked_bytes: int
    places: frozenset[int]


T = TypeVar("T")


class StreamedModel(AttendingModel[M]):
    """One checkpoint's model: its weights in host memory and, between `start` and `stop`, what of it is on the device.

    `plan` is the one that it was last started with: leaner than the one asked for where the device ran out of memory
    since.
    """

    def __init__(
        self,
        path: str | Path,
        settings: RunSettings,
        registrar: Registrar | None = None,
        between_blocks: Callable[[], None] | None = None,
        loras: Sequence[LoraChoice] = (),
    ):
        super().__init__(path, settings, registrar, between_blocks, loras)
        self.streamer: BlockStreamer | None = None
        self.ring: DeviceRing | None = None
        self.forget_contexts()
        self.compiled: CompiledCode | None = None
        self._on_spans: SpanSink | None = None
        self.several: Several[StreamedModel[M]] | None = None
        self.is_beside = False  # whether it is another card's part of such
        self.use_sparse(settings.sparse)
        if settings.others:
            self.use_cards(settings.others)

    def open_beside(self, device: torch.device, between_blocks: Callable[[], None]) -> StreamedModel[M]:
        """The same file for another card."""
        settings = self.settings_beside(device)
        return type(self)(self.path, settings, None, between_blocks, self._loras)

    def settings_beside(self, device: torch.device) -> RunSettings:
        """Those of the same model on another card, whose products are made as here."""
        return replace(self.settings, device=device, others=(), sparse=None, quantization=self.quantization)

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
    def devices(self) -> tuple[torch.device, ...]:
        """Of all cards that make a pass, its own first."""
        return self.settings.device, *(other.settings.device for other in self._others)

    # Changes, between runs

    def use_cards(self, devices: Sequence[torch.device]) -> None:
        """Share passes with these cards, or with none, from the next start on."""
        self.stop()
        before, self.several = self.several, None
        if before is not None:
            before.close()
        if self.settings.quantization == AUTO_FAST:
            self.choose_products(devices)
        if devices:
            self.several = Several(self, devices, self.open_beside)
            for other in self._others:
                other.resemble(self)
        self.agree_on_attention()
        if devices or before is not None:
            self.use_sparse(self._sparse_settings)

    def resemble(self, first: StreamedModel[M]) -> None:
        """Have the LoRAs of the same model on another card, and code that is compiled as its is."""
        self.is_beside = True
        if first.weights.loras.loras or self.weights.loras.loras:
            self.weights.attach_loras(*first.weights.attached)
        if first.compiled is not None:
            self.compile(first.compiled.settings)

    def start_beside(self, first: StreamedModel[M], plan: MemoryPlan) -> None:
        """`start` on a card of its own, from the first one's host memory where that holds the blocks."""
        ours, theirs = self.model.execution, first.model.execution
        is_other = (ours.dtype, ours.attention.name) != (theirs.dtype, theirs.attention.name)
        if is_other:
            spec = AttentionSpec(self.settings.device, theirs.dtype, self.config.head_dim)
            attention = select_attention(theirs.attention.name, spec)
            self.model.execution = replace(ours, dtype=theirs.dtype, attention=attention)
        if is_other or (ours.watch is None) != (theirs.watch is None):
            self.use_sparse(first._sparse_settings, theirs.watch)
        self.weights.share(first.weights)
        self.start(plan)

    def compile(self, settings: CompileSettings | None) -> None:
        """Let the blocks, and perhaps what is worth it beside them, run as compiled code; None: as plain PyTorch.

        ValueError where that cannot be: they run as before.
        """
        if settings is not None:
            for model in (self, *self._others):
                check_compiling(settings, model.settings.device)
        code, self.compiled = self.compiled, None
        if code is not None:
            code.close()
        any_size = settings is not None and settings.dynamic is True and self.model.fits_any_size
        self.model.execution = replace(self.model.execution, any_size=any_size)
        if settings is not None:
            others = () if settings.transformer_blocks_only else self.model.outer_modules()
            self.compiled = CompiledCode(
                [*self.blocks, *others], settings, self.settings.device, self._code_name, any_size
            )
        for other in self._others:
            other.compile(settings)
        if not self.is_beside:
            self.use_sparse(self._sparse_settings)

    @property
    def _compiled(self) -> bool:
        return self.compiled is not None

    @property
    def _alone(self) -> bool:
        return self.several is None and not self.is_beside

    def begin_steps(self) -> None:
        super().begin_steps()
        if self.compiled is not None:
            self.compiled.begin_run()

    def limiting_code(self) -> AbstractContextManager[None]:
        """Dynamo's limits as they were chosen, for a thread that runs its compiled code."""
        return dynamo_limits(None if self.compiled is None else self.compiled.settings)

    @property
    def _code_name(self) -> str:
        """What compiled code depends on beside settings and machine: kept code of another is of no use."""
        execution = self.model.execution
        return f"{self.config}, {self.costs.form}, {execution.dtype}, {execution.attention.name}"

    def set_lora_strengths(self, strengths: Sequence[float]) -> None:
        """Other strengths, one per LoRA; nothing is read again but what LoRAs are merged into."""
        self.forget_contexts()  # LoRAs change them too
        if self.weights.loras.are_merged:
            self.stop()
        if self.weights.set_lora_strengths(strengths):
            self.release()
        for other in self._others:
            other.set_lora_strengths(strengths)

    def attach_loras(self, loras: Sequence[Lora], strengths: Sequence[float], origin: Source | None = None) -> None:
        """Have these LoRAs on the model, which is stopped for it; see `HostWeights.attach_loras`."""
        self.stop()
        self.weights.attach_loras(loras, strengths, origin)
        for other in self._others:
            other.attach_loras(loras, strengths, origin)

    # Runs

    def make_plan(self, work: WorkSize, limits: Limits) -> MemoryPlan:
        """The plan for this work; PlanError names what would fit where this does not."""
        return plan_shared(self.footprint(), work, limits, 1 + len(self._others))

    def start_fitting(self, plan: MemoryPlan, on_spans: SpanSink | None = None) -> None:
        """`start`; when the device runs out of memory meanwhile, with a leaner plan.

        `on_spans` is told what a GPU's streams did when, also after later starts with leaner plans.
        """
        self.stop()
        self._on_spans = on_spans
        self._fitting(lambda: None if self.started else self.start(plan))

    def retrying(self, run: Callable[[], T]) -> T:
        """A pass; when the device runs out of memory, also while starting anew, it is repeated with a leaner plan."""
        return self._fitting(lambda: self._compiling(run))

    def _fitting(self, run: Callable[[], T]) -> T:
        leaner: MemoryPlan | None = None
        while True:
            try:
                if leaner is not None:
                    self.start(leaner)
                return self._of_one_file(run)
            except RuntimeError as error:
                if not is_out_of_memory(error) or (leaner := self._leaner_plan()) is None:
                    raise
            # outside the handler: its traceback holds the failed pass's activations
            self.stop()
            torch.cuda.empty_cache()

    def _compiling(self, run: Callable[[], T]) -> T:
        """A pass, before the first of which the code of each kind of block is made; told of and kept."""
        code = self.compiled
        if code is None or self.plan is None:
            return run()
        rows, stream = self.plan.work.rows, self.model.stream

        def run_one_of_each() -> None:
            self.model.stream = code.first_of_each(stream)
            try:
                run()
            finally:
                self.model.stream = stream

        if self.several is None:
            code.make_first(run_one_of_each, rows)
        with code.watching(rows):
            return run()

    def _of_one_file(self, run: Callable[[], T]) -> T:
        """A pass; CheckpointError where a file that it reads from was changed since it was opened."""
        if self.fixed.transient is None and (self.plan is None or not self.plan.host.from_disk):
            return run()
        self._stamps.check()
        made = run()
        self._stamps.check()
        return made

    def start(self, plan: MemoryPlan, ring: DeviceRing | None = None) -> None:
        """Put the model on its device as the plan says. `ring` is one shared with another expert of the same layout."""
        self.stop()
        self.plan = plan
        self._read(plan)
        assert self.weights.blocks is not None
        try:
            self.fixed.load_for_passes(plan.choice.transient_fixed)
            self.weights.loras.place(self.settings.device)
            self.ring = ring or self._make_ring(plan)
            self.streamer = BlockStreamer(
                self.blocks,
                self.weights.blocks,
                self.settings.device,
                ring=self.ring,
                resident=plan.blocks.resident,
                part=Part.STREAM if plan.choice.cache_text_kv or self.parts.per_run else Part.ALL,
                in_stages=plan.choice.in_stages,
                between_blocks=self.between_blocks,
            )
            self.streamer.load()
            if self.several is not None:
                self.several.start(plan)
        except BaseException:
            self.stop()
            raise
        self.model.stream = self.streamer
        if plan.choice.in_stages:
            self.model.arrive = self.streamer.arrive
        room_bytes = plan.model.room_bytes(plan.work, plan.choice, plan.limits)
        self.model.execution = self.model.execution.planned(plan.choice, room_bytes)
        self.model.counted_scratch = self.model.scratch_elements()

    def parked_blocks(self) -> list[Parked]:
        """What lies in other cards' memory, by card; nothing unless started."""
        if self.streamer is None:
            return []
        homes = ((home, home.source) for home in self.weights.homes)
        return [
            Parked(str(parked.card), len(home.blocks), parked.parked_bytes, self.streamer.places_of(home.blocks))
            for home, parked in homes
            if isinstance(parked, ParkedBlocks)
        ]

    def settle(self) -> None:
        """Wait for the device; who is told of spans then knows of all that it did."""
        if self.streamer is not None:
            self.streamer.streams.synchronize()

    def stop(self) -> None:
        """Give the device memory back; the weights stay in host memory. Calling it again does nothing."""
        self.model.stream = iter
        self.model.arrive, self.model.counted_scratch = all_there, None
        self.forget_contexts()
        self.end_steps()
        streamer, self.streamer, self.ring = self.streamer, None, None
        if streamer is not None:
            streamer.unload()
        self.fixed.unload()
        if self.several is not None:
            self.several.stop()

    def release(self) -> None:
        """Give device and host memory back."""
        self.stop()
        self.weights.release()

    @contextmanager
    def preparing(self, plan: MemoryPlan) -> Iterator[None]:
        """The modules needed once per run on the device, and `visit` at hand, for what is made once per run.

        The model is stopped for it, so that this memory and that of a pass are not wanted at the same time.
        """
        self.stop()
        self._read(plan)
        names = self.fixed.per_run_names
        try:
            self.fixed.load(names)
            self.weights.loras.place(self.settings.device)
            yield
        finally:
            self.fixed.unload(names)

    def visit(self, make: Callable[[Block], T]) -> list[T]:
        """What `make` makes of each block in a pass with only its optional weights; they then stay at home."""
        source, device = self.weights.blocks, self.settings.device
        assert source is not None
        largest = max(layout.part_bytes(Part.OPTIONAL) for layout in source.layouts)
        in_place = device.type == "cpu" and isinstance(source, HostBlocks)
        visitor = BlockStreamer(
            self.blocks, source, device, ring=None if in_place else DeviceRing(2 * largest, device),
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

    @property
    def _others(self) -> Sequence[StreamedModel[M]]:
        return () if self.several is None else self.several.others

    def _leaner_plan(self) -> MemoryPlan | None:
        if self.plan is None:
            return None
        try:
            leaner = plan_leaner(self.plan)
        except PlanError:
            return None
        logger.warning(
            "out of VRAM under a plan of %s: the pass is repeated with one of %s; no step is lost",
            in_gib(self.plan.denoise.total),
            in_gib(leaner.denoise.total),
        )
        return leaner

    def _make_ring(self, plan: MemoryPlan) -> DeviceRing | None:
        device = self.settings.device
        if device.type == "cpu" and self.weights.extents is not None:
            return None  # the blocks run where they lie
        return DeviceRing(plan.blocks.ring_bytes, device, streams_for(device, self._on_spans))
