"""One model file under ComfyUI's memory management: planned, loaded, run, and given back."""

from __future__ import annotations

import logging
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...attention.backend import Backend
from ...memory.plan.footprint import Limits, WorkSize
from ...memory.plan.limits import context_bound, hold_allocator, hold_budget
from ...memory.plan.plan import MemoryPlan, PlanError
from ...memory.plan.table import reasons, verdict
from ...memory.report.report import RunReport
from ...runtime.run_record import RunRecord
from ...runtime.settings import RunSettings
from ...runtime.several import plan_shared
from ...runtime.status_texts import loading
from ...runtime.streamed import StreamedModel
from ...runtime.turns import Turns
from ...sampling.caching.sampler_steps import Call, SamplerSteps
from ...sampling.caching.settings import StepCacheSettings
from ...system.device_errors import is_out_of_memory
from ...system.sizes import GIB
from ...weights.lora.merged_source import MergedSource
from . import host
from .options import StreamOptions
from .patch_shapes import fitting
from .patches import SortedPatches, patched_source, sort_patches
from .room import Room
from .status import Loading, teller

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=StreamedModel[Any])
WORTH_A_START = 0.97  # of a step's time: for less, a model that is on its device stays as it is
RAM_TO_KEEP = 1.25  # RAM free beside an idle model, in its own size, for its host memory to stay


class Engine(Generic[S]):
    """Shared by all MODELs that come from one loader; the last one loaded says how it runs (`configure`).

    Nothing is on the device before the first pass: only then is the size of the work known. `open_model` opens a
    model's file, such as the class StreamedWan.
    """

    plan_note = ""  # said with every plan that is shown

    def __init__(self, open_model: Callable[..., S], path: Path, settings: RunSettings, turns: Turns | None = None):
        settings = replace(settings, pinned_memory=host.may_pin())
        registrar = host.HostRegistrar(settings.device) if settings.device.type == "cuda" else None
        self._loading = Loading()
        self.streamed: S = open_model(path, settings, registrar, self._loading.check)
        if turns is not None:
            turns.add(self.streamed)
        self.room = Room(self.streamed)
        self.streamed.on_yield = weakref.WeakMethod(self._tell_owner)
        self.options = StreamOptions()
        self._is_configured = True  # as the options say
        self.report: RunReport | None = None
        self.owner: weakref.ref[nn.Module] | None = None  # ComfyUI's model, told where its weights are
        # Of LoRA files, by file and name, while anything uses them: for another strength nothing is read again.
        self.lora_tensors: weakref.WeakValueDictionary[tuple[str, ...], Tensor] = weakref.WeakValueDictionary()
        self.card_patchers: weakref.WeakValueDictionary[torch.device, Any] = weakref.WeakValueDictionary()
        self._patches_id: object = None  # ComfyUI's name for a set of patches
        self._patches = SortedPatches()
        self._applied: SortedPatches | None = self._patches  # those that the weights have; None: it failed midway
        self.record = RunRecord(settings.device)
        self.sampler_steps = SamplerSteps()
        self._running = False

    # What ComfyUI's memory management asks of it

    @property
    def device(self) -> torch.device:
        return self.streamed.settings.device

    @property
    def device_bytes(self) -> int:
        return self.streamed.device_bytes

    def bytes_on(self, card: torch.device) -> int:
        """Bytes of weights, and of the ring for them, on one of its devices."""
        return self.room.held(card)

    @property
    def total_bytes(self) -> int:
        return self.streamed.weights.total_bytes

    def configure(self, options: StreamOptions, patches: Mapping[str, Sequence[Any]], patches_id: object) -> None:
        """Run as these options say and with these weight patches, from the next pass on."""
        anew, self._is_configured = not self._is_configured, False  # where it failed midway: all of them
        changed = {field.name for field in fields(options)} if anew else options.differences(self.options)
        if changed:
            self.streamed.stop() if options.same_host_memory(self.options) else self.streamed.release()
            if "others" in changed:  # first: one card can do what several cannot
                self.streamed.use_cards(())
            if "compile" in changed:
                self.streamed.compile(options.compile)
            if "sparse" in changed:
                self.streamed.use_sparse(options.sparse)
            if "step_cache" in changed:
                self.use_step_cache(options.step_cache)
            if "others" in changed:
                self.streamed.use_cards(options.others)
                self.record.others = options.others
            self.options = options
        self._is_configured = True
        if patches_id != self._patches_id or not patches:
            self._patches_id = patches_id
            self._patches = sort_patches(patches, self.streamed.model) if patches else SortedPatches()
        applied = self._applied
        if applied is not None and self._patches.same_but_strengths(applied):
            if self._patches.strengths != applied.strengths:
                self._applied = None
                self.streamed.set_lora_strengths(self._patches.strengths)
            self._applied = self._patches
        elif self._patches is not self._applied:
            self.streamed.stop()
        self._tell_owner()

    def unload(self) -> int:
        """Free device and pinned memory. The weights stay in RAM where much of it is free. Returns device bytes."""
        if self._running:  # something else is loaded in the middle of a pass
            return 0
        freed = self.device_bytes
        self.streamed.stop()
        self.unpin()
        if host.free_ram() < RAM_TO_KEEP * self.total_bytes:
            self.release()
        self._tell_owner()
        return freed

    def give_back(self, card: torch.device) -> None:
        """Free what is held of one of its devices, which something else wants."""
        if card in self.options.others:
            self.unload()
        elif not self._running:  # only blocks are there, which the next pass has elsewhere
            self.streamed.stop()
            self.streamed.weights.unpark(card)
            self._tell_owner()

    def unpin(self) -> None:
        """Give pinned memory back while nothing runs."""
        if not self.streamed.started and not self._running:
            self.streamed.weights.unpin()

    def release(self) -> None:
        """Free device and host memory."""
        self.streamed.release()
        self._tell_owner()

    def begin_run(self, phase: str | None = "denoise") -> None:
        """A sampler starts, all of which is one phase of the report; None: it enters phases of its own."""
        self.end_run()
        self.record.begin(phase)
        self.streamed.in_run = True
        self.sampler_steps.begin()
        self.streamed.begin_steps()
        if self.streamed.started:
            self.record.uses(self.streamed)

    def end_run(self) -> None:
        """The sampler is done, or gave up."""
        self.streamed.in_run = False
        self.streamed.end_steps()
        if self.record.running:
            self.streamed.settle()
            self.record.end()
            self.report = self.record.report()
            if self.streamed.compiled is not None:
                self.streamed.compiled.end_run()
        self.streamed.forget_contexts()

    # Planning

    def video_work(self, width: int, height: int, frames: int, passes_per_step: int) -> WorkSize:
        """The work of one step of a video of this size, in pixels and frames."""
        raise NotImplementedError

    def plan(self, work: WorkSize, options: StreamOptions | None = None) -> MemoryPlan:
        """The plan for this work as memory is now. PlanError says what would fit.

        Another model that runs in turn with this one keeps its place while both fit.
        """
        options = options or self.options
        try:
            return self.streamed.make_plan(work, self.room.limits(options))
        except PlanError:
            if not any(host.evictable_vram(self._owner(), card) for card in self.room.cards(options)):
                raise
        for card in self.room.cards(options):
            host.unload_others(self._owner(), card)
        return self.streamed.make_plan(work, self.room.limits(options))

    def could_be_faster(self, plan: MemoryPlan) -> bool:
        """Whether memory was short when `plan` was made, or ran out under it, and no longer is."""
        try:
            now = self.streamed.make_plan(plan.work, self.room.limits(self.options))
        except PlanError:
            return False
        return now.seconds_per_step < WORTH_A_START * plan.seconds_per_step

    def preview(self, work: WorkSize, options: StreamOptions, card_gb: float = 0.0) -> MemoryPlan:
        """The plan that a run with these options would have; with `card_gb` on a card of so many GB.

        Where ComfyUI runs on the CPU a card is needed, and planned for in bf16. PlanError says what would fit.
        """
        dtype = None if self.device.type == "cuda" else torch.bfloat16
        if card_gb:
            limits = self.room.card_limits(options, card_gb)
        else:
            limits = self.room.limits(options, lambda card: host.evictable_vram(self._owner(), card))
        return plan_shared(self.streamed.footprint(dtype), work, limits, len(self.room.cards(options)))

    def vram_left(self) -> int | None:
        """Bytes that a budget given by hand leaves beside what PyTorch holds now; None without one."""
        if not self.options.vram_budget_gb or self.device.type != "cuda":
            return None
        limits = Limits(int(self.options.vram_budget_gb * GIB))
        used = limits.context_bytes + torch.cuda.memory_allocated(self.device)
        return max(0, limits.vram_budget_bytes - used)

    # Running

    def prepare(self) -> None:
        """Before a run is planned: the weights carry their patches, and other models make room for a budget."""
        self.streamed.stop()
        self._apply_patches()  # first: whose host memory fits depends on them
        if self.options.parking is not None:
            self.streamed.clear_cards()
        giver = self.streamed.giver()
        if giver is not None:  # before the plan: what it has of the device is free then
            giver.make_way()
        if self.options.vram_budget_gb:
            self.evict_others()
        self._apply_patches()
        weights = self.streamed.weights
        self._loading.expect(loading(weights.total_bytes, isinstance(weights.source, MergedSource)))

    def evict_others(self) -> None:
        """Have all other models leave its devices, and PyTorch's cache, where earlier nodes left something."""
        for card in self.room.cards(self.options):
            host.unload_others(self._owner(), card)
        host.empty_cache()

    def start(self, plan: MemoryPlan) -> None:
        """Have the model on the device."""
        with self.within_budget():
            self.streamed.start_fitting(plan, self.record.add_spans)
        self._loading.expect("")
        self.record.uses(self.streamed)
        self._tell_owner()
        if self.device.type == "cuda":
            teller()(verdict(plan))
        logger.info("%s\n%s", plan.model.name, "\n".join(reasons(plan)))

    def check_step_cache(self, settings: StepCacheSettings) -> None:
        """ValueError where this model cannot skip steps so."""
        raise ValueError(
            "Step Cache (Low VRAM) is for Wan models: FramePack has a step cache of its own, use_teacache of FramePack "
            "Sampler; take this node out"
        )

    def use_step_cache(self, settings: StepCacheSettings | None) -> None:
        """Skip steps as these settings say; None: compute them all."""
        if settings is not None:
            self.check_step_cache(settings)

    def choose_attention(self, shape: Sequence[int]) -> None:
        """Before a run over latents of this shape, whose settings depend on it: have the fastest attention for it."""

    def at_step(self, transformer_options: Mapping[str, Any]) -> Call | None:
        """Where in a sampler's run the next pass is, by what core tells of noise levels; None where nobody asks."""
        levels, level = transformer_options.get("sample_sigmas"), transformer_options.get("sigmas")
        asked = self.streamed.model.execution.watch is not None or self.streamed.step_cache is not None
        if not asked or levels is None or level is None or len(levels) < 2:
            return None
        call = self.sampler_steps.at(levels, level)
        self.streamed.at_step(call.step, len(call.levels) - 1, call.number)
        return call

    def check_latent(self, latent: Tensor) -> None:
        """Before one of ComfyUI's samplers runs: ValueError, with the fix, for what this model cannot sample."""

    def _apply_patches(self) -> None:
        """Have the weights carry the patches that were asked for, and no others."""
        wanted = self._patches
        if wanted is self._applied:
            return
        checkpoint = self.streamed.checkpoint
        merged = fitting(wanted, checkpoint)
        source = patched_source(checkpoint, merged) if merged else checkpoint
        self._applied = None  # until all of it is there
        self.streamed.attach_loras(wanted.loras(), wanted.strengths, source)
        self._applied = wanted

    @contextmanager
    def returning_memory(self) -> Iterator[None]:
        """Device and pinned memory are given back when what goes in here fails or is interrupted.

        After an interrupt, or where the device was full, the weights stay in RAM as after `unload`: they are whole,
        and the next run wants them. After another failure they go too.
        """
        self._running = True
        try:
            yield
        except BaseException as error:  # an interrupt is no Exception
            self._running = False
            # its frames hold the failed pass's activations for as long as anybody holds the error
            traceback.clear_frames(error.__traceback__)
            if host.is_interrupt(error) or is_out_of_memory(error):
                self.unload()
            else:
                self.release()
            host.empty_cache()
            raise
        finally:
            self._running = False

    @contextmanager
    def attending(self, backend: Backend) -> Iterator[None]:
        """Passes in here have this attention, which sees all queries at once.

        ValueError where self-attention is to be sparse: it cannot be both.
        """
        model = self.streamed.model
        own = model.execution
        if self.options.others:
            raise ValueError(
                "another node gives this MODEL an attention of its own (optimized_attention_override), which sees all "
                "tokens, and several GPUs have some each: take that node or Several GPUs (Low VRAM) out"
            )
        if own.is_sparse:
            raise ValueError(
                "another node gives this MODEL an attention of its own (optimized_attention_override), and Sparse "
                "Attention (Low VRAM) another: take one of the two nodes out"
            )
        model.execution = mine = replace(own, attention=backend, all_queries=True)
        try:
            yield
        finally:  # a pass that ran out of memory may have begun anew, leaner
            changed = model.execution is not mine
            own_again = replace(model.execution, attention=own.attention, all_queries=False)
            model.execution = own_again if changed else own

    @contextmanager
    def within_budget(self) -> Iterator[None]:
        """Passes go in here; a budget given by hand is held by PyTorch's allocator meanwhile."""
        if not self.options.vram_budget_gb or self.device.type != "cuda":
            yield
            return
        cards, budget = self.room.cards(self.options), int(self.options.vram_budget_gb * GIB)
        try:
            for card in cards:
                hold_budget(card, Limits(budget, context_bytes=context_bound(card)))
            yield
        finally:
            for card in cards:
                hold_allocator(card, None)

    def _owner(self) -> nn.Module | None:
        return self.owner() if self.owner is not None else None

    def _tell_owner(self) -> None:
        owner: Any = self._owner()
        if owner is not None:
            owner.device = self.device if self.streamed.started else host.CPU
            owner.model_loaded_weight_memory = self.device_bytes
