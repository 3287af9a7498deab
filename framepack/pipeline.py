"""A model from files, without ComfyUI: its memory and progress, as a run asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..memory.plan.footprint import Limits, WorkSize
from ..memory.plan.host_memory import RAM_MARGIN_BYTES
from ..memory.plan.plan import MemoryPlan
from ..memory.report.report import RunReport
from ..memory.stream.pinned import CudaRegistrar
from ..runtime.progress import Progress
from ..runtime.run_limits import hold_limits
from ..runtime.run_record import RunRecord
from ..runtime.settings import RunSettings
from ..sampling.solver import StepInfo
from ..vae.retries import at_work
from ..weights.lora.file import LoraChoice
from ..weights.lora.fingerprint import lora_fingerprint
from ..weights.lora.report import LoraReport
from .section_work import FramePackGuidance, Guide
from .sections import Section
from .streamed import StreamedFramePack
from .vae.checkpoint import HUNYUAN_FORMAT
from .vae.decoding import DecodeBudget
from .vae.model import HunyuanVAE


@dataclass(frozen=True)
class FramePackFiles:
    """The checkpoint files of one model; `model_type` is "auto", "base" or "f1"."""

    model: Path
    vae: Path
    loras: tuple[LoraChoice, ...] = ()
    model_type: str = "auto"


class FramePackPipeline:
    """One model's files, ready to make videos: a `RunHost`. Opening reads headers; CheckpointError for other models."""

    def __init__(
        self,
        files: FramePackFiles,
        settings: RunSettings = RunSettings(),  # noqa: B008 - immutable
        progress: Progress = Progress(),  # noqa: B008
        between_blocks: Callable[[], None] | None = None,
    ):
        """`between_blocks` is called before each block of the transformer, and may raise to stop."""
        self.files, self.settings, self.progress = files, settings, progress
        self.model = StreamedFramePack(files.model, settings, None, between_blocks, files.loras, files.model_type)
        self._vae = HUNYUAN_FORMAT.open_file(files.vae)
        self.plan: MemoryPlan | None = None
        self.record = RunRecord(settings.device, settings.others)
        self._limits: Limits | None = None

    @property
    def loras(self) -> tuple[Any, ...]:
        """What tells the LoRAs from others."""
        return tuple([choice.path.name, lora_fingerprint(choice.path), choice.strength] for choice in self.files.loras)

    @property
    def guide(self) -> Guide:
        return FramePackGuidance()

    @contextmanager
    def running(self, num_steps: int) -> Iterator[None]:
        """See `RunHost`."""
        self._limits = hold_limits(self.settings, self.model.model.execution, self.model.host_bytes)
        with torch.inference_mode(), self.record.run(self._limits):
            try:
                yield
            finally:
                self.progress.end()
                if self.settings.keep_model:
                    self.model.stop()
                else:
                    self.model.release()
                self.free_memory()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name != "denoise":  # its steps are told by section
            self.progress.begin(name)
        with self.record.phase(name):
            yield

    def within_budget(self) -> AbstractContextManager[None]:
        return nullcontext()  # it is held throughout

    def make_plan(self, work: WorkSize) -> MemoryPlan:
        assert self._limits is not None
        self.plan = self.model.make_plan(work, self._limits)
        return self.plan

    def start(self, plan: MemoryPlan) -> None:
        self.model.start_fitting(plan, self.record.add_spans)
        self.record.uses(self.model)

    def on_step(self, section: Section, step: StepInfo) -> None:
        if step.index == 0:
            self.progress.begin(f"section {section.number + 1} of {section.num_sections}")
        self.progress.update(step.index + 1, step.num_steps)

    def check_interrupt(self, done: int, total: int) -> None:
        return  # Ctrl-C raises by itself

    @contextmanager
    def decoder(self, latents: Tensor) -> Iterator[tuple[HunyuanVAE, DecodeBudget | None]]:
        self.model.stop()
        self.free_memory()
        settings = self.settings
        with at_work(lambda: self._vae.build(settings.compute_dtype, settings.device, only="decoder")) as vae:
            yield vae, self._decode_budget()

    def free_memory(self) -> None:
        torch.cuda.empty_cache()

    def lora_reports(self) -> list[LoraReport]:
        """How much of each LoRA is applied."""
        return [lora.report for lora in self.model.weights.loras.loras]

    def report(self) -> RunReport:
        """What the last video used."""
        return self.record.report()

    def release(self) -> None:
        """Give back the memory that is kept between videos."""
        self.model.release()

    def _decode_budget(self) -> DecodeBudget | None:
        """What the budgets leave for decoding.

        Host memory only of a RAM budget given by hand: the clips of a section take as much as the model.
        """
        device, limits = self.settings.device, self._limits
        if device.type != "cuda" or limits is None:
            return None
        free = limits.vram_budget_bytes - limits.context_bytes - torch.cuda.memory_allocated(device)
        host_bytes = 0
        if self.settings.ram_budget_gib is not None and limits.ram_budget_bytes is not None:
            host_bytes = max(0, limits.ram_budget_bytes - RAM_MARGIN_BYTES - self.model.host_bytes)
        return DecodeBudget(free, host_bytes, CudaRegistrar(device) if self.settings.pinned_memory else None)
