"""A transformer on a device that need not hold it: weights where the plan says, blocks streamed while they run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..attention.backend import AttentionSpec, Backend
from ..attention.select import AUTO, AUTO_FAST, select_attention, select_fastest, select_sparse
from ..attention.sparse.run import AttentionRun
from ..attention.sparse.settings import SparseSettings
from ..attention.timing import AttentionSize
from ..compilation.blocks import dynamo_limits
from ..compilation.code import CompiledCode
from ..compilation.settings import CompileSettings
from ..memory.plan.footprint import Limits, ModelFootprint, WorkSize
from ..memory.plan.plan import MemoryPlan, PlanError, plan_leaner
from ..memory.stream.host_blocks import HostBlocks
from ..memory.stream.layout import Part
from ..memory.stream.parked_blocks import ParkedBlocks
from ..memory.stream.pinned import CudaRegistrar, Registrar
from ..memory.stream.ring import DeviceRing
from ..memory.stream.streamer import BlockStreamer
from ..memory.stream.streams import SpanSink, streams_for
from ..sampling.caching.moments import Moment
from ..sampling.caching.step_cache import StepCache
from ..system.device_errors import is_out_of_memory
from ..system.dtypes import half_dtype
from ..system.host_memory import return_freed_bytes
from ..system.sizes import in_gib
from ..transformer.transformer import Block, Transformer
from ..transformer.workspace import all_there
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.stamps import FileStamps
from ..weights.linear.compute import select_compute
from ..weights.linear.quantize import quantize_checkpoint
from ..weights.lora.file import Lora, LoraChoice, open_loras
from ..weights.lora.merged_source import Source
from ..weights.lora.names import Aliases
from .fixed_weights import FixedWeights
from .host_weights import HostWeights, WeightParts
from .layer_costs import LayerCosts
from .settings import RunSettings
from .several import Several, plan_shared

logger = logging.getLogger(__name__)

NUM_READERS = 8  # threads
SAFE_ATTENTION = "sdpa"


class Parked(NamedTuple):
    """Blocks in another card's memory: how many, their bytes, and their places in a pass (see `Span`)."""

    card: str
    num_blocks: int
    parked_bytes: int
    places: frozenset[int]


M = TypeVar("M", bound=Transformer)
T = TypeVar("T")


class StreamedModel(Generic[M]):
    """One checkpoint's model: its weights in host memory and, between `start` and `stop`, what of it is on the device.

    Opening reads the file's header only; CheckpointError for a file of another kind. `model` is on the meta device.
    `plan` is the one that it was last started with: leaner than the one asked for where the device ran out of memory
    since.
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
        self._stamps = FileStamps(info.file for info in stored.tensors.values())
        self.settings, self.between_blocks = settings, between_blocks
        self.model.execution = settings.execution(self.config.head_dim)
        self.blocks: list[Block] = list(self.model.ordered_blocks().values())
        self.costs = LayerCosts(self.model, self.blocks, self.parts)
        select_compute(self.model, self.costs.busy_modules, settings.quantization, settings.device)
        if registrar is None and settings.device.type == "cuda" and settings.pinned_memory:
            registrar = CudaRegistrar(settings.device)
        self.weights = HostWeights(self.model, checkpoint, self.parts, settings, registrar, between_blocks)
        self.fixed = FixedWeights(self.model, self.weights, self.parts, settings.device)
        if loras:
            opened = open_loras(loras, checkpoint.tensors, self.aliases)
            self.weights.attach_loras(opened, [choice.strength for choice in loras])
        self.partners: weakref.WeakSet[StreamedModel[Any]] = weakref.WeakSet()  # see `Turns`
        self.on_yield: weakref.WeakMethod[Callable[[], None]] | None = None  # called when it is stopped for another
        self.in_run = False  # set by what runs it: its host memory is wanted again, also while it is stopped
        self.plan: MemoryPlan | None = None
        self.streamer: BlockStreamer | None = None
        self.ring: DeviceRing | None = None
        self.forget_contexts()
        self.compiled: CompiledCode | None = None
        self._before_safe_path: tuple[torch.dtype, Backend, AttentionRun | None] | None = None
        self._on_spans: SpanSink | None = None
        self._attention_tokens = 0  # of the size that attention was chosen for
        self._step: tuple[int, int, int | None] | None = None  # what `at_step` was told last; None before a run's first
        self.several: Several[StreamedModel[M]] | None = None
        self.is_beside = False  # whether it is another card's part of such
        self.use_sparse(settings.sparse)
        if settings.others:
            self.use_cards(settings.others)

    # What a model says of itself

    @property
    def _compiled(self) -> bool:
        return self.compiled is not None

    def open_file(self, path: str | Path) -> tuple[Any, Checkpoint]:
        """Its dimensions, and its tensors by their own names."""
        raise NotImplementedError

    def build(self, checkpoint: Checkpoint) -> M:
        """The model of `config` on the meta device, every tensor of the dtype that is stored."""
        raise NotImplementedError

    def lora_aliases(self, checkpoint: Checkpoint) -> Aliases:
        """The names that LoRAs may call its layers by."""
        raise NotImplementedError

    def open_beside(self, device: torch.device, between_blocks: Callable[[], None]) -> StreamedModel[M]:
        """The same file for another card."""
        settings = replace(self.settings, device=device, others=(), sparse=None)
        return type(self)(self.path, settings, None, between_blocks, self._loras)

    def footprint(self, dtype: torch.dtype | None = None) -> ModelFootprint:
        """The model as the planner sees it, from the file's own byte counts; `dtype` is another one to compute in."""
        raise NotImplementedError

    @property
    def computes_in_8_bits(self) -> bool:
        """Whether the user chose products or attention of 8-bit numbers, or of smaller ones."""
        execution = self.model.execution
        by_attention = not execution.attention.exact and not execution.all_queries  # another pack's is nobody's choice
        return self.settings.quantization in ("fp8_fast", "int8", "4bit_fast") or by_attention

    def forget_contexts(self) -> None:
        """Free what was made of prompts."""

    @property
    def started(self) -> bool:
        return self.streamer is not None

    @property
    def _safe_dtype(self) -> torch.dtype:
        dtype = self.model.execution.dtype
        if dtype != torch.float16:
            return dtype
        return torch.bfloat16 if half_dtype(self.settings.device) == torch.bfloat16 else torch.float32

    @property
    def on_safe_path(self) -> bool:
        """Whether it computes with PyTorch's attention, and not in fp16."""
        execution = self.model.execution
        exact = execution.attention.name == SAFE_ATTENTION and not execution.is_sparse
        return exact and self._safe_dtype == execution.dtype

    def take_safe_path(self) -> bool:
        """Compute with PyTorch's attention, and in bf16 or fp32 where it was fp16, from the next start on.

        False where it does so already.
        """
        if self.on_safe_path:
            return False
        execution, device, dtype = self.model.execution, self.settings.device, self._safe_dtype
        self.stop()
        attention = select_attention(SAFE_ATTENTION, AttentionSpec(device, dtype, self.config.head_dim))
        self._before_safe_path = execution.dtype, execution.attention, execution.watch
        self.model.execution = replace(execution, dtype=dtype, attention=attention, watch=None)
        return True

    def leave_safe_path(self) -> None:
        """Compute as before `take_safe_path`, from the next start on; nothing where it was not taken."""
        before, self._before_safe_path = self._before_safe_path, None
        if before is not None:
            self.stop()
            self.model.execution = replace(self.model.execution, dtype=before[0], attention=before[1], watch=before[2])

    def likely_cause(self, more: str = "") -> str:
        """Words on why its latents are no numbers, the likeliest first; `more` is one of whoever asks."""
        execution, loras = self.model.execution, self.weights.loras.loras
        causes = [more] if more else []
        causes += [f"a LoRA ({lora.checkpoint.path.name}) or its strength" for lora in loras[:1]]
        if execution.dtype == torch.float16:
            causes.append("fp16, whose numbers end at 65504")
        if execution.attention.name != SAFE_ATTENTION:
            causes.append(f"the attention backend {execution.attention.name}")
        if execution.is_sparse:
            causes.append("sparse attention")
        return " or ".join([*causes, f"damaged weights in {self.checkpoint.path.name} (download it again)"])

    @property
    def arithmetic(self) -> dict[str, str]:
        """What a result depends on beside the weights: a run that goes on must compute as before."""
        execution, device = self.model.execution, self.settings.device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(execution.dtype),
            "quantization": self.settings.quantization,
            "attention": execution.attention.name,
            "elementwise": execution.ops.name,
            "loras": self.settings.lora_mode,
            "batched_guidance": str(self.settings.batched_guidance),
            "compiled": str(self._compiled),
            "torch": str(torch.__version__),
            **self._sparse_arithmetic,
            **({} if self.step_cache is None else {"step_cache": str(self.step_cache)}),
        }

    @property
    def _sparse_arithmetic(self) -> dict[str, str]:
        watch = self.model.execution.watch
        if watch is None or watch.sparse is None:
            return {}
        return {"sparse": f"{watch.sparse.name}, {watch.settings}"}

    @property
    def device_bytes(self) -> int:
        """Bytes of weights, and of the ring for them, on the device; 0 unless started."""
        if self.plan is None or not self.started:
            return 0
        memory = self.plan.denoise
        return memory.fixed_weights + memory.residents + memory.ring

    @property
    def host_bytes(self) -> int:
        return self.weights.host_bytes

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

    def giver(self) -> StreamedModel[Any] | None:
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

    # Changes, between runs

    def choose_attention(self, tokens: int) -> None:
        """Have the fastest attention for a pass of so many tokens, where the choice is ours; not between passes.

        It is timed on a GPU, once for a size; before a run's settings are told, as it is one of them.
        """
        execution, device, mode = self.model.execution, self.settings.device, self.settings.attention_mode
        known = tokens == self._attention_tokens or self._before_safe_path is not None
        if known or mode not in (AUTO, AUTO_FAST) or not self._may_time:
            return
        spec = AttentionSpec(device, execution.dtype, self.config.head_dim)
        size, self._attention_tokens = AttentionSize(tokens, self.config.num_heads), tokens
        chosen = select_fastest(mode, spec, size)
        if chosen.name == execution.attention.name:
            return
        self.stop()
        self.model.execution = replace(execution, attention=chosen)
        self.use_sparse(self._sparse_settings)

    @property
    def _may_time(self) -> bool:
        return self.settings.device.type == "cuda"

    @property
    def _sparse_settings(self) -> SparseSettings | None:
        watch = self.model.execution.watch
        return None if watch is None else watch.settings

    def check_sparse(self, settings: SparseSettings) -> None:
        """AttentionUnavailable (a ValueError), with what is missing, where sparse attention cannot run here."""
        if settings.bound != 0:
            select_sparse(AttentionSpec(self.settings.device, self.model.execution.dtype, self.config.head_dim))
        for other in self._others:
            other.check_sparse(settings)

    def use_sparse(self, settings: SparseSettings | None, leader: AttentionRun | None = None) -> None:
        """Leave out of self-attention what these settings say; None, or a bound of 0: nothing.

        AttentionUnavailable (a ValueError) where sparse attention cannot run here, with what is missing. What is
        inexact is compared with dense attention in every run, but for code that is compiled in one piece. Several cards
        do as the first one's `leader` says, which learns for all; what is inexact alone is compared on one card only.
        """
        execution, device = self.model.execution, self.settings.device
        if settings is not None and settings.bound == 0:
            settings = None
        self.stop()
        watch, alone = None, self.several is None and not self.is_beside
        watches = not execution.attention.exact and not self._compiled and alone
        if settings is not None or watches:
            spec = AttentionSpec(device, execution.dtype, self.config.head_dim)
            kernel = None if settings is None else select_sparse(spec)
            watch = AttentionRun(
                execution.attention, len(self.blocks), self.config.num_heads, kernel, settings, leader, not alone
            )
            if self._step is not None:  # attention is chosen for a run whose first step has begun
                watch.begin_step(*self._step)
        self.model.execution = replace(execution, watch=watch)
        for other in self._others:
            other.use_sparse(settings, watch)

    def at_step(self, step: int, num_steps: int, call: int | None = None) -> None:
        """The passes that follow are of this step of a run's; what attention leaves out depends on it.

        `call` is as `AttentionRun.begin_step` has it.
        """
        self._step = step, num_steps, call
        watch = self.model.execution.watch
        if watch is not None:
            watch.begin_step(step, num_steps, call)

    def use_cards(self, devices: Sequence[torch.device]) -> None:
        """Share passes with these cards, or with none, from the next start on."""
        self.stop()
        before, self.several = self.several, None
        if before is not None:
            before.close()
        if devices:
            self.several = Several(self, devices, self.open_beside)
            for other in self._others:
                other.resemble(self)
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
        """Let the blocks, and perhaps what is worth it beside them, run as compiled code; None: as plain PyTorch."""
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

    def begin_steps(self) -> None:
        """A run begins: no step of the last one is reused, nor what was learnt of it."""
        self._step = None
        if (watch := self.model.execution.watch) is not None:
            watch.begin_run()
        if self.step_cache is not None:
            self.step_cache.begin_run()
        if self.compiled is not None:
            self.compiled.begin_run()

    def end_steps(self) -> None:
        """The run is over, or given up: nothing of its steps is kept."""
        if self.step_cache is not None:
            self.step_cache.forget_residuals()

    def at_moment(self, moment: Moment) -> None:
        """The passes that follow are here in the schedule."""
        if self.step_cache is not None:
            self.step_cache.at(moment)

    def learnt(self) -> list[Tensor]:
        """What a run that goes on from here must know: what sparse attention learnt so far, and what a step cache
        decided since this was last asked; `num_learnt` tensors."""
        watch = self.model.execution.watch
        state = None if watch is None else watch.state()
        learnt = [] if state is None else [state]
        return learnt if self.step_cache is None else [*learnt, self.step_cache.decisions()]

    @property
    def num_learnt(self) -> int:
        watch = self.model.execution.watch
        return int(watch is not None and watch.settings is not None) + int(self.step_cache is not None)

    def learn(self, states: Sequence[Tensor]) -> None:
        """Go on with what sparse attention had learnt, by `learnt`."""
        watch = self.model.execution.watch
        if watch is not None and watch.settings is not None:
            watch.restore(states[0])

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
        self.model.execution = replace(
            self.model.execution,
            token_chunk=plan.choice.token_chunk,
            head_groups=plan.choice.head_groups,
            query_chunk=plan.choice.query_chunk,
            packed_keys=plan.choice.packed_keys,
        )

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
        self.model.arrive = all_there
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
