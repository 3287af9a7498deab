"""A FramePack run from the command line: its kept sections and the video file that grows with them, or a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from .diffusion.account import RunAccount
from .framepack.film import Film
from .framepack.generation import section_size
from .framepack.pipeline import FramePackPipeline
from .framepack.request import Material, Sampling
from .framepack.room import check_room
from .framepack.runs import RunStore
from .framepack.sections import FRAMES_PER_SECOND, SPATIAL_STRIDE, num_frames
from .framepack.timed_prompts import TimedPrompt
from .video_frames import read_pieces
from .weights.fingerprint import fingerprint
from .whole_files import write_file


@dataclass(frozen=True)
class RunPlaces:
    """Where things are: the video or picture to write, the folder that keeps runs (None: nothing is kept), and the
    video that is extended, all of which plays before what is made."""

    output: Path
    runs: Path | None
    extend: Path | None = None


class FramePackRun:
    """One request; `with FramePackRun.open(...) as run: run.make()`. What is there already is not made again."""

    def __init__(
        self,
        pipeline: FramePackPipeline,
        sampling: Sampling,
        material: Material,
        places: RunPlaces,
        store: RunStore | None,
        folder: Path,
    ) -> None:
        """Use `open`."""
        self.pipeline, self.sampling, self.material, self.places = pipeline, sampling, material, places
        self.store = store
        self.num_sections = len(material.sections(sampling))
        self.film: Film | None = None
        self._check_room()
        if sampling.one_frame is None:
            grows: Literal["front", "back"] = "front" if sampling.mode == "base" else "back"
            vae = fingerprint(pipeline.files.vae)
            self.film = Film(folder / "film", places.output, FRAMES_PER_SECOND, grows=grows, made_by=vae)

    @classmethod
    @contextmanager
    def open(
        cls, pipeline: FramePackPipeline, sampling: Sampling, material: Material, places: RunPlaces
    ) -> Iterator[FramePackRun]:
        """The run of this request, in a folder of its own in `places.runs`, or in one that is removed afterwards.

        ValueError where a folder cannot be written, is too small, or another process works on the same run.
        """
        with ExitStack() as stack:
            store = None
            if places.runs is None:
                place = TemporaryDirectory(
                    prefix="lowvram-video-", dir=places.output.parent, ignore_cleanup_errors=True
                )
                folder = Path(stack.enter_context(place))
            else:
                store = stack.enter_context(pipeline.open_run(places.runs, sampling, material))
                folder = store.folder
            yield cls(pipeline, sampling, material, places, store, folder)

    def make(self) -> None:
        """All that is missing; the video plays at any moment."""
        before = self._add_given_video()
        num_decoded = 0 if self.film is None else self.film.num_sections - before
        if num_decoded == self.num_sections:
            return
        generator = self.pipeline.generate(self.sampling, self.material, self.store, num_decoded)
        with closing(generator) as sections:  # type: ignore[type-var] # it is one, though its type says less
            try:
                for section in sections:
                    if self.film is not None:
                        self.film.add(section.frames, section.overlap)
                    else:
                        write_file(self.places.output, _png(section.frames[0]))
            except BaseException:  # an interrupt too
                if self.film is not None:
                    self.film.leave()
                raise
        if self.film is not None:
            self.film.finish()

    def result(self) -> str:
        """One line on what was made."""
        if self.film is None:
            return f"{self.places.output}: a picture, {self.sampling.one_frame} latents after the start"
        kept = "" if self.store is None else f"; its sections are kept in {self.store.folder}"
        return f"{self.places.output}: {self.film.num_frames} frames{kept}"

    def kept(self) -> str:
        """One line on what there is of an unfinished run, and how it goes on."""
        shown = ""
        if self.film is not None and self.film.num_shown:
            shown = f"{self.places.output} holds the {self.film.num_shown} frames made so far"
        if self.store is None or not self.store.completed:
            return shown or "no section was made yet"
        done = f"{self.store.completed} of {self.num_sections} sections are kept in {self.store.folder}"
        return f"{done}{shown and f', {shown}'}; the same command goes on from there"

    def _add_given_video(self) -> int:
        """Put the video to extend before its continuation; returns how many of the film's sections that is.

        Where it is shorter than a window, the first section holds all of it already.
        """
        given, video = self.material.given, self.places.extend
        if self.film is None or video is None or given is None or given.shape[2] < self.sampling.window:
            return 0
        if self.film.num_sections == 0:
            height, width = (SPATIAL_STRIDE * side for side in self.material.latent_size)
            self.film.begin(read_pieces(video, width, height, FRAMES_PER_SECOND), num_frames(self.sampling.window))
        return 1

    def _check_room(self) -> None:
        if self.store is not None:
            check_room(self.store, self.sampling, self.material, with_film=self.sampling.one_frame is None)


def _png(frame: Tensor) -> bytes:
    """`frame [H, W, 3]`, uint8, as a file."""
    data = BytesIO()
    Image.fromarray(frame.numpy()).save(data, "PNG")
    return data.getvalue()


def plan_ahead(pipeline: FramePackPipeline, sampling: Sampling, size: tuple[int, int], end_image: bool) -> None:
    """Hold the budget from here on, encoders included; PlanError where the sections will not fit in it.

    `size` is (width, height). The pipeline plans again when it begins: what is free may be less by then.
    """
    model = pipeline.model
    limits = RunAccount(pipeline.settings).begin(model.model.execution)
    height, width = size[1] // SPATIAL_STRIDE, size[0] // SPATIAL_STRIDE
    end = torch.zeros(1, 16, 1, height, width) if end_image else None
    nothing_yet = Material((height, width), TimedPrompt(""), {}, end=end)
    model.make_plan(section_size(sampling, nothing_yet), limits)
