"""FramePack Sampler's run: what it asks of ComfyUI, and where its video is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ...framepack.run.host import RunPlaces
from ...framepack.run.run import FramePackRun
from ...framepack.section_work import Guide
from ...framepack.sections import FRAMES_PER_SECOND, Section
from ...framepack.streamed import StreamedFramePack
from ...framepack.vae.decoding import DecodeBudget
from ...framepack.vae.model import HunyuanVAE
from ...memory.plan.footprint import WorkSize
from ...memory.plan.plan import MemoryPlan
from ...runtime.status_texts import PREPARING, decoding, section_step, sections_done
from ...sampling.solver import StepInfo
from ...system.atomic_files import write_file
from ...system.bounded_json import read_json_object
from ...video.growing_video import GrowingVideo, Grows
from ...video.tags import Tags
from . import host
from .framepack_engine import FramePackEngine
from .framepack_request import SamplerInputs
from .moving_preview import MovingPreview, moving_preview
from .native_vae import native_decoder, vae_fingerprint
from .page import show_video
from .patcher import StreamedModelPatcher
from .status import Tell, teller

logger = logging.getLogger(__name__)

MAX_NOTE_BYTES = 2**16


class ComfyRunHost:
    """A `RunHost` under ComfyUI's memory management, progress bar and interrupts."""

    def __init__(self, patcher: StreamedModelPatcher, vae: Any, guide: Guide, identity: Sequence[Any] | None):
        """`identity` tells what nodes gave the MODEL, as JSON values and tensors; None: that cannot be told."""
        self._patcher, self._vae, self._identity = patcher, vae, tuple(identity or ())
        self.guide, self.can_resume = guide, identity is not None
        patcher.configure()  # a run is known by how the engine computes: as this MODEL says, not the one before
        self._engine = cast(FramePackEngine, patcher.engine)
        self._preview: host.SamplingPreview | None = None
        self._moving: MovingPreview | None = None
        self._at: Section | None = None  # the last one of which a step was made
        self._tell: Tell = teller()

    @property
    def model(self) -> StreamedFramePack:
        return self._engine.streamed

    @property
    def loras(self) -> tuple[Any, ...]:
        return self._identity

    @contextmanager
    def running(self, num_steps: int) -> Iterator[None]:
        self._preview = host.SamplingPreview(self._patcher, max(1, num_steps))
        host.load_model(self._patcher)
        self._engine.begin_run(phase=None)
        self._tell, self._at = teller(), None
        try:
            with moving_preview(self._patcher.model.latent_format, self._engine) as self._moving:
                yield
        finally:
            self._engine.end_run()
        if self._at is not None:
            self._tell(sections_done(self._at.num_sections))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "prepare":
            self._tell(PREPARING)
        with self._engine.record.phase(name), self._engine.returning_memory():
            yield

    def within_budget(self) -> AbstractContextManager[None]:
        return self._engine.within_budget()

    def make_plan(self, work: WorkSize) -> MemoryPlan:
        self._engine.prepare()
        return self._engine.plan(work)

    def start(self, plan: MemoryPlan) -> None:
        self._engine.prepare()
        self._engine.start(plan)

    def free_memory(self) -> None:
        self._engine.evict_others()

    @contextmanager
    def decoder(self, latents: Tensor) -> Iterator[tuple[HunyuanVAE, DecodeBudget | None]]:
        engine, at = self._engine, self._at
        self._tell(decoding(*((0, 0) if at is None else (at.number + 1, at.num_sections))))
        with engine.within_budget():
            engine.leave_device()
            with native_decoder(self._vae, latents, engine.vram_left) as decoder:
                yield decoder
        # making room for the VAE may have struck us off ComfyUI's list of models
        host.load_model(self._patcher)

    def on_step(self, section: Section, step: StepInfo) -> None:
        assert self._preview is not None
        self._at = section
        self._tell(section_step(section.number + 1, section.num_sections, step.index + 1, step.num_steps))
        self._preview.step(step.denoised)
        if self._moving is not None:
            self._moving.show(step.denoised)

    def check_interrupt(self, done: int, total: int) -> None:
        host.check_interrupt(done, total)


def comfy_run_host(request: SamplerInputs, vae: Any) -> ComfyRunHost:
    """The host of a run; one whose nodes cannot be told from others is not taken up again."""
    guide = request.guide()
    try:
        identity = request.told()
    except ValueError as error:  # what is no use was refused above
        logger.warning("this run's sections are not kept: %s", error)
        return ComfyRunHost(request.patcher, vae, guide, None)
    return ComfyRunHost(request.patcher, vae, guide, identity)


@contextmanager
def pausing(run: FramePackRun) -> Iterator[None]:
    """An interrupt of a run that is kept pauses it: all models leave the devices until it is queued again."""
    try:
        yield
    except BaseException as error:  # an interrupt is no Exception
        if host.is_interrupt(error) and run.store is not None:
            host.leave_device()
            logger.info("paused: %d sections are kept in %s; queue again to go on", run.completed, run.store.folder)
        raise


class ShownFilm(GrowingVideo):
    """A film that the page shows, in the nodes of these ids, whenever more of it can be played."""

    nodes: Sequence[str] = ()

    def add(self, frames: Tensor, overlap: int) -> None:
        shown = self.num_shown
        super().add(frames, overlap)
        if self.num_shown != shown:
            show_video(self.nodes, self.video)


def run_places(vae: Any, resume: bool, prefix: str, tags: Tags, shown_in: Sequence[str] = ()) -> RunPlaces:
    """Where ComfyUI has sections and the video, which has `tags`; without a VAE there is none.

    It is shown as it grows in the nodes with the ids `shown_in`.
    """

    def film(folder: Path, grows: Grows) -> GrowingVideo:
        made_by, path = vae_fingerprint(vae), _film_path(folder, prefix)
        film = ShownFilm(folder, path, FRAMES_PER_SECOND, grows=grows, made_by=made_by, tags=tags)
        if not film.num_sections and path.exists() and not GrowingVideo.is_at(folder, path):  # what is there stays
            path = _new_place(folder, prefix)
            film = ShownFilm(folder, path, FRAMES_PER_SECOND, grows=grows, made_by=made_by, tags=tags)
        film.nodes = tuple(shown_in)
        return film

    runs = host.output_folder("framepack") if resume else None
    return RunPlaces(runs, host.temporary_folder(), None if vae is None else film)


def _film_path(folder: Path, prefix: str) -> Path:
    """Where the film shall be: where it is, if nobody has put another there and the prefix is the same."""
    note = folder / "place.json"
    noted = _noted_place(note, prefix)
    if noted is not None and GrowingVideo.is_at(folder, noted):
        return noted
    return _new_place(folder, prefix)


def _noted_place(note: Path, prefix: str) -> Path | None:
    """The file that the note names for this prefix, if it is a video in ComfyUI's output folder: it may be edited."""
    try:
        place = read_json_object(note, MAX_NOTE_BYTES)
        path = Path(place["path"])
        inside = path.resolve().is_relative_to(host.output_folder("").resolve())
        return path if place["prefix"] == prefix and path.suffix == ".mp4" and inside else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _new_place(folder: Path, prefix: str) -> Path:
    """A file that is not there yet, noted as the film's."""
    note = folder / "place.json"
    folder.mkdir(parents=True, exist_ok=True)
    path = host.output_path(prefix, ".mp4")
    write_file(note, json.dumps({"prefix": prefix, "path": str(path)}).encode())
    return path
