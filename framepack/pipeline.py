"""From files and a prompt to a video that grows section by section: encode, denoise, decode, and kept at every step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.account import RunAccount
from ..diffusion.progress import Progress, Silent
from ..diffusion.settings import RunSettings
from ..memory.ladder import RAM_MARGIN_BYTES
from ..memory.pinned import CudaRegistrar
from ..memory.plan import MemoryPlan
from ..memory.report import RunReport
from ..sampling.solver import StepInfo
from ..weights.fingerprint import fingerprint
from ..weights.lora import LoraChoice, LoraReport
from .decoding import DecodeRoom, decode_section
from .generation import NOTHING, Generation, MadeSection, prepare, section_size
from .model import BlockCache, Frames, History, StepCondition
from .request import Material, ModelIdentity, Sampling, run_settings
from .runs import RunStore
from .sections import Section, num_frames
from .streamed import StreamedFramePack
from .vae import HunyuanVAE
from .vae_checkpoint import load_vae, open_vae

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FramePackFiles:
    """The checkpoint files of one model; `model_type` is "auto", "base" or "f1"."""

    model: Path
    vae: Path
    loras: tuple[LoraChoice, ...] = ()
    model_type: str = "auto"


@dataclass(frozen=True)
class DecodedSection:
    """A section's frames `[T, H, W, 3]`, uint8, `overlap` of which its neighbours have too (`Film.add`)."""

    made: MadeSection
    frames: Tensor
    overlap: int


class FramePackPipeline:
    """One model's files, ready to make videos. Opening reads headers; CheckpointError for files of other models."""

    def __init__(
        self,
        files: FramePackFiles,
        settings: RunSettings = RunSettings(),  # noqa: B008 - immutable
        progress: Progress = Silent(),  # noqa: B008
    ):
        self.files, self.settings, self.progress = files, settings, progress
        self.model = StreamedFramePack(files.model, settings, loras=files.loras, model_type=files.model_type)
        open_vae(files.vae)
        self.plan: MemoryPlan | None = None
        self._account = RunAccount(settings)

    def open_run(self, runs: Path, sampling: Sampling, material: Material) -> RunStore:
        """Where the sections of this request are kept, and those that are there already."""
        loras = tuple([choice.path.name, fingerprint(choice.path), choice.strength] for choice in self.files.loras)
        model = ModelIdentity(self.files.model.name, fingerprint(self.files.model), loras, self.model.arithmetic)
        settings = run_settings(sampling, material, model)
        return RunStore.open(runs, settings, len(material.sections(sampling)))

    @torch.inference_mode()
    def generate(
        self, sampling: Sampling, material: Material, store: RunStore | None = None, num_decoded: int = 0
    ) -> Iterator[DecodedSection]:
        """The sections as they are decoded, but for the first `num_decoded`; `store` keeps their latents.

        Bad requests are ValueErrors before anything is loaded.
        """
        sections = material.sections(sampling)
        material.check_for(self.model.config)
        for prompt in material.timed.unheard(sections):
            logger.warning("the prompt %r holds for less than a section, and is not heard", prompt)
        self.plan = self._plan(sampling, material)
        with self._account.monitor as monitor:
            try:
                with monitor.phase("prepare"):
                    self.progress.begin("prepare")
                    complete = store is not None and store.completed == len(sections)
                    conditions = NOTHING
                    if not complete:
                        conditions = prepare(self.model, self.plan, sampling, material, sections)
                generation = Generation(
                    self._velocity, sampling, material, sections, conditions, self.settings.device, store, self._on_step
                )
                made = iter(generation.run())
                while True:
                    with monitor.phase("denoise"):
                        section = next(made, None)
                    if section is None:
                        break
                    if section.section.number >= num_decoded:
                        with monitor.phase("decode"):
                            frames = self._decode(section)
                        yield DecodedSection(section, frames, num_frames(sampling.window))
            finally:
                self.progress.end()
                self._stop()
        if store is not None:
            store.finish()

    def lora_reports(self) -> list[LoraReport]:
        """How much of each LoRA is applied."""
        return [lora.report for lora in self.model.weights.loras.loras]

    def report(self) -> RunReport:
        """What the last video used."""
        return self._account.report({"denoise": self.plan.denoise.total} if self.plan else {})

    def _plan(self, sampling: Sampling, material: Material) -> MemoryPlan:
        limits = self._account.begin(self.model.model.execution)
        return self.model.make_plan(section_size(sampling, material), limits)

    def _velocity(
        self, noisy: Frames, history: History, condition: StepCondition, image: Tensor | None, cache: BlockCache | None
    ) -> Tensor:
        if not self.model.started:
            assert self.plan is not None
            # leaner than at first, if the device ran out of memory
            self.model.start_fitting(self.model.plan or self.plan)
            self._account.note_pinned(self.model)
        return self.model(noisy, history, condition, image, cache)

    def _on_step(self, section: Section, step: StepInfo) -> None:
        if step.index == 0:
            self.progress.begin(f"section {section.number + 1} of {section.num_sections}")
        self.progress.update(step.index + 1, step.num_steps)

    def _decode(self, made: MadeSection) -> Tensor:
        """Frames of a section, with the model's device memory given back meanwhile."""
        self.progress.begin("decode")
        self._account.note_spans(self.model)
        self.model.stop()
        self._empty_cache()
        vae = self._load_vae()
        frames = decode_section(vae, made.to_decode, self._decode_room())
        del vae
        self._empty_cache()
        return frames

    def _decode_room(self) -> DecodeRoom | None:
        """What the budgets leave for decoding.

        Host memory only of a RAM budget given by hand: the clips of a section take as much as the model.
        """
        device, limits = self.settings.device, self._account.limits
        if device.type != "cuda" or limits is None:
            return None
        free = limits.vram_budget_bytes - limits.context_bytes - torch.cuda.memory_allocated(device)
        host_bytes = 0
        if self.settings.ram_budget_gib is not None and limits.ram_budget_bytes is not None:
            host_bytes = max(0, limits.ram_budget_bytes - RAM_MARGIN_BYTES - self.model.host_bytes)
        return DecodeRoom(free, host_bytes, CudaRegistrar(device) if self.settings.pinned_memory else None)

    def _load_vae(self) -> HunyuanVAE:
        return load_vae(self.files.vae, self.settings.compute_dtype, self.settings.device)

    def _empty_cache(self) -> None:
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    def _stop(self) -> None:
        self._account.note_spans(self.model)
        self.model.release()
        self._empty_cache()
