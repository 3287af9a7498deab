"""One run: its sections made or taken up, kept, decoded and shown, whoever wants them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from ...memory.plan.plan import MemoryPlan
from ...system.device_errors import is_out_of_memory
from ...system.scratch_folders import scratch_folder
from ...transformer.block_cache import BlockCache
from ...video.growing_video import Grows, disk_bytes
from ...weights.files.fingerprint import fingerprint
from ..footprint import SectionSize
from ..network.model import Frames, History, StepCondition
from ..request import EncodedInputs, Sampling
from ..sections import FRAMES_PER_LATENT, SPATIAL_STRIDE, num_frames
from ..vae.decoding import decode_section
from .folder import RunStore
from .generation import NOTHING, Conditions, Generation, MadeSection, prepare, section_size
from .host import Output, RunHost, RunPlaces

logger = logging.getLogger(__name__)


class FramePackRun:
    """One request; `with FramePackRun.open(...) as run: latents = run.make()`. What is kept of it is not made again."""

    def __init__(
        self,
        host: RunHost,
        sampling: Sampling,
        inputs: EncodedInputs,
        places: RunPlaces,
        store: RunStore | None = None,
        output: Output | None = None,
    ) -> None:
        """Use `open`."""
        self.host, self.sampling, self.inputs, self.places = host, sampling, inputs, places
        self.store, self.output = store, output
        self.sections = inputs.sections(sampling)
        self._started_with: MemoryPlan | None = None
        self._leaner: MemoryPlan | None = None  # once the device ran out of memory, for the rest of the run

    @classmethod
    @contextmanager
    def open(
        cls, host: RunHost, sampling: Sampling, inputs: EncodedInputs, places: RunPlaces
    ) -> Iterator[FramePackRun]:
        """The run of this request in a folder of its own; where nothing is kept, that is removed afterwards.

        Nothing is loaded yet. ValueError for a bad request, and where a folder cannot be written, is too small, or
        another process works on the same run.
        """
        sections = inputs.sections(sampling)
        inputs.check_for(host.model.config)
        host.model.choose_attention(section_size(sampling, inputs.latent_size, inputs.end is not None).tokens)
        for prompt in inputs.timed.unused(sections):
            logger.warning(
                "the prompt %r is not heard: others hold all the time, or it holds for less than a section", prompt
            )
        with ExitStack() as stack:
            store = None
            if places.runs is None:
                folder = stack.enter_context(scratch_folder(places.scratch))
            else:
                store = stack.enter_context(open_store(host, places.runs, sampling, inputs))
                folder = store.folder
                check_disk(store, sampling, inputs, with_video=places.output is not None)
            grows: Grows = "front" if sections[0].prepend else "back"
            output = None if places.output is None else places.output(folder / "film", grows)
            yield cls(host, sampling, inputs, places, store, output)

    @property
    def _work(self) -> SectionSize:
        num_others = len(self.inputs.prompts_to_make(self.sampling.cfg))
        return section_size(self.sampling, self.inputs.latent_size, self.inputs.end is not None, num_others)

    @property
    def completed(self) -> int:
        """How many sections are kept."""
        return 0 if self.store is None else self.store.completed

    def make(self) -> Tensor:
        """All latents of the video, in its order; what is shown then shows all of it, after an error too."""
        try:
            with self.host.running((len(self.sections) - self.completed) * self.sampling.num_steps):
                try:
                    latents = self._make()
                finally:  # the next run is known by how the model computes
                    self.host.model.leave_safe_path()
        except BaseException:  # an interrupt is no Exception
            if self.output is not None:
                self.output.leave()
            raise
        if self.output is not None:
            self.output.finish()
        if self.store is not None:
            self.store.finish()
        return latents

    def _make(self) -> Tensor:
        generation = self._generation()
        num_before = self._add_given()
        made: MadeSection | None = None
        for made in self._denoised(generation):
            if self.output is not None and made.section.number + num_before >= self.output.num_sections:
                self.output.add(self._decode(made.to_decode), num_frames(self.sampling.window))
        assert made is not None
        return made.video

    def _generation(self) -> Generation:
        host, conditions = self.host, NOTHING
        with host.phase("prepare"):
            if self.completed < len(self.sections):
                conditions = self._prepare()
        device = host.model.settings.device
        return Generation(
            self._velocity, self.sampling, self.inputs, self.sections, conditions, device, self.store, host.on_step,
            host.guide, host.model.likely_cause(), self._take_safe_path, self._free, host.model.at_step,
        )  # fmt: skip

    def _free(self) -> None:
        self.host.model.stop()
        self.host.free_memory()

    def _take_safe_path(self) -> Conditions | None:
        """What the steps see on the safe path, which the model takes; None where it is on that already."""
        if not self.host.model.take_safe_path():
            return None
        if self.completed == len(self.sections):
            return NOTHING
        logger.warning("exact attention from here on, in %s", self.host.model.model.execution.dtype)
        return self._prepare()

    def _prepare(self) -> Conditions:
        """What is made once per run; once more where the device ran out of memory, all that is idle gone from it.

        PlanError, before anything is read, where a section does not fit.
        """
        model = self.host.model
        plan = self.host.make_plan(self._work)
        try:
            with self.host.within_budget():
                return prepare(model, plan, self.sampling, self.inputs, self.sections)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("out of VRAM while the run is prepared: it is tried again")
        # outside the handler: its traceback holds tensors
        self.host.free_memory()
        with self.host.within_budget():
            return prepare(model, plan, self.sampling, self.inputs, self.sections)

    def _add_given(self) -> int:
        """Put the video to extend before its continuation; returns how many of the output's sections that is.

        A video shorter than a section is a part of the first section's frames instead.
        """
        given, output, still_open = self.inputs.given, self.output, num_frames(self.sampling.window)
        if output is None or given is None or given.shape[2] < self.sampling.window:
            return 0
        if not output.num_sections:
            if self.places.given is None:
                output.add(self._decode(given), still_open)
            else:
                output.begin(self.places.given(), still_open)
        return 1

    def _denoised(self, generation: Generation) -> Iterator[MadeSection]:
        made = iter(generation.run())
        while True:
            with self.host.phase("denoise"):
                section = next(made, None)
            if section is None:
                return
            yield section

    def _velocity(
        self, noisy: Frames, history: History, condition: StepCondition, image: Tensor | None, cache: BlockCache | None
    ) -> Tensor:
        if not self.host.model.started:
            self._start()
        with self.host.within_budget():
            return self.host.model(noisy, history, condition, image, cache)

    def _start(self) -> None:
        """The model on the device; leaner than planned for the rest of the run, if it ran out of memory in it."""
        ran_with = self.host.model.plan
        if self._started_with is not None and ran_with is not self._started_with:
            self._leaner = ran_with
        self._started_with = self._leaner or self.host.make_plan(self._work)
        self.host.start(self._started_with)

    def _decode(self, latents: Tensor) -> Tensor:
        """Frames `[T, H, W, 3]`, uint8, with the model's device memory given back meanwhile."""
        with self.host.phase("decode"), self.host.decoder(latents) as (vae, budget):
            return decode_section(vae, latents, budget, self.host.check_interrupt)


def open_store(host: RunHost, runs: Path, sampling: Sampling, inputs: EncodedInputs) -> RunStore:
    """Where the sections of this request are kept, by all that they depend on. Raises as `RunStore.open`."""
    path = host.model.checkpoint.path
    model = {
        "file": path.name,
        "fingerprint": fingerprint(path),
        "loras": list(host.loras),
        "settings": host.model.arithmetic,
    }
    settings = {"sampling": sampling.identity(), "material": inputs.identity(), "model": model}
    return RunStore.open(runs, settings, len(inputs.sections(sampling)))


def check_disk(store: RunStore, sampling: Sampling, inputs: EncodedInputs, with_video: bool) -> None:
    """ValueError where the disk has no room for what a run keeps: its sections, and the video where it has one."""
    height, width = inputs.latent_size
    window, video_bytes = sampling.window, 0
    if with_video and sampling.one_frame is None:
        total = FRAMES_PER_LATENT * window * store.total_sections
        video_bytes = disk_bytes(total, SPATIAL_STRIDE * height, SPATIAL_STRIDE * width, num_frames(window))
    store.check_free_space(4 * 16 * (window + 1) * height * width, video_bytes)
