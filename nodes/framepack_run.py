"""One execution of FramePack Sampler: the model loaded, sections made, kept and decoded."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast
from uuid import uuid4

from torch import Tensor

from ..framepack.decoding import decode_section
from ..framepack.film import Film
from ..framepack.generation import NOTHING, Generation, MadeSection
from ..framepack.request import Material, ModelIdentity, Sampling, run_settings
from ..framepack.room import check_room
from ..framepack.runs import RunStore
from ..framepack.sections import FRAMES_PER_SECOND, Section, num_frames
from ..sampling.solver import StepInfo
from ..weights.fingerprint import fingerprint
from ..whole_files import write_file
from . import host
from .framepack_engine import FramePackEngine
from .hunyuan_vae import native_decoder, vae_fingerprint
from .patcher import StreamedModelPatcher
from .patches import patch_identity

logger = logging.getLogger(__name__)


class SamplerRun:
    """A request that was checked; what of it is kept from an earlier run is not made again."""

    def __init__(self, patcher: StreamedModelPatcher, sampling: Sampling, material: Material):
        self.patcher, self.sampling, self.material = patcher, sampling, material
        self.engine = cast(FramePackEngine, patcher.engine)
        self.sections = material.sections(sampling)
        for prompt in material.timed.unheard(self.sections):
            logger.warning(
                "the prompt %r is not heard: others hold all the time, or it holds for less than a section", prompt
            )

    @contextmanager
    def store(self, resume: bool) -> Iterator[RunStore | None]:
        """Where the sections are kept."""
        if not resume:
            yield None
            return
        streamed = self.engine.streamed
        path = streamed.checkpoint.path
        identity = ModelIdentity(
            path.name, fingerprint(path), tuple(patch_identity(self.patcher.patches)), streamed.arithmetic
        )
        settings = run_settings(self.sampling, self.material, identity)
        with RunStore.open(host.output_folder("framepack"), settings, len(self.sections)) as store:
            if store.completed:
                found = store.completed, len(self.sections)
                logger.info("%s: %d of %d sections are there already, of an earlier run", store.folder, *found)
            yield store

    @contextmanager
    def film(self, store: RunStore | None, vae: Any, prefix: str) -> Iterator[Film | None]:
        """The video that grows; None without a VAE, and for a single picture."""
        wanted = vae is not None and self.sampling.one_frame is None
        if store is not None:
            check_room(store, self.sampling, self.material, with_film=wanted)
        if not wanted:
            yield None
            return
        folder = host.temporary_path(f"framepack_film_{uuid4().hex}") if store is None else store.folder / "film"
        grows: Literal["front", "back"] = "front" if self.sections[0].prepend else "back"
        made_by, path = vae_fingerprint(vae), _film_path(folder, prefix)
        film = Film(folder, path, FRAMES_PER_SECOND, grows=grows, made_by=made_by)
        if not film.num_sections and path.exists():  # it is begun anew, and what is there stays
            film = Film(folder, _new_place(folder, prefix), FRAMES_PER_SECOND, grows=grows, made_by=made_by)
        yield film

    def make(self, store: RunStore | None, film: Film | None, vae: Any) -> Tensor:
        """All latents of the video, in its order."""
        host.load_model(self.patcher)
        self.engine.begin_run()
        try:
            generation = self._generation(store)
            num_before = self._add_given(film, vae)
            made: MadeSection | None = None
            for made in generation.run():
                if film is not None and made.section.number + num_before >= film.num_sections:
                    self._decode(made.to_decode, film, vae)
            assert made is not None
            if store is not None:
                store.finish()
            if film is not None:
                film.finish()
            return made.video
        except BaseException:  # an interrupt is no Exception
            if film is not None:
                film.leave()
            raise
        finally:
            self.engine.end_run()

    def _generation(self, store: RunStore | None) -> Generation:
        num_missing = len(self.sections) - (0 if store is None else store.completed)
        conditions = NOTHING
        if num_missing:
            conditions = self.engine.prepared(self.sampling, self.material, self.sections)
        preview = host.SamplingPreview(self.patcher, max(1, num_missing) * self.sampling.num_steps)

        def on_step(section: Section, step: StepInfo) -> None:
            preview.step(step.denoised)

        return Generation(
            self.engine.velocity,
            self.sampling,
            self.material,
            self.sections,
            conditions,
            self.engine.device,
            store,
            on_step,
        )

    def _add_given(self, film: Film | None, vae: Any) -> int:
        """Put the video to extend before its continuation; returns how many of the film's sections that is.

        A video shorter than a section is a part of the first section's frames instead.
        """
        given = self.material.given
        if film is None or given is None or given.shape[2] < self.sampling.window:
            return 0
        if not film.num_sections:
            self._decode(given, film, vae)
        return 1

    def _decode(self, latents: Tensor, film: Film, vae: Any) -> None:
        engine = self.engine
        with engine.returning_memory(), engine.within_budget():
            engine.leave_device()
            with native_decoder(vae, latents, engine.vram_left) as (decoder, room):
                frames = decode_section(decoder, latents, room, host.check_interrupt)
        # making room for the VAE may have struck us off ComfyUI's list of models
        host.load_model(self.patcher)
        # so many frames are shared with the section before and with the one after
        film.add(frames, num_frames(self.sampling.window))


def _film_path(folder: Path, prefix: str) -> Path:
    """Where the film shall be: where it is, if nobody has put another there and the prefix is the same."""
    note = folder / "place.json"
    if note.is_file():
        place = json.loads(note.read_text(encoding="utf-8"))
        path = Path(place["path"])
        if place["prefix"] == prefix and Film.is_at(folder, path):
            return path
    return _new_place(folder, prefix)


def _new_place(folder: Path, prefix: str) -> Path:
    """A file that is not there yet, noted as the film's."""
    note = folder / "place.json"
    folder.mkdir(parents=True, exist_ok=True)
    path = host.output_path(prefix, ".mp4")
    write_file(note, json.dumps({"prefix": prefix, "path": str(path)}).encode())
    return path
