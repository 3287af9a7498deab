"""What a FramePack run makes on the command line: a video that grows, or a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..framepack.pipeline import FramePackPipeline
from ..framepack.request import Sampling
from ..framepack.run.generation import section_size
from ..framepack.run.host import Output, RunPlaces
from ..framepack.run.run import FramePackRun
from ..framepack.sections import FRAMES_PER_SECOND, SPATIAL_STRIDE
from ..runtime.run_limits import hold_limits
from ..system.atomic_files import write_file
from ..system.output_lock import is_noted, note_output
from ..video.given_video import GivenVideo
from ..video.growing_video import GrowingVideo, Grows
from ..video.reader import read_pieces
from ..video.tags import Tags
from ..weights.files.fingerprint import fingerprint
from .output import OutputFile


@dataclass(frozen=True)
class Files:
    """The video or picture to write, the folder that keeps runs (None: nothing is kept), the video's tags, and the
    video that is extended, all of which plays before what is made."""

    chosen: OutputFile
    command: str  # see `command_key`
    runs: Path | None
    tags: Tags
    extend: GivenVideo | None = None

    @property
    def output(self) -> Path:
        return self.chosen.path

    def check(self) -> None:
        """ValueError where the output is there and no run that is kept has made it."""
        self.chosen.check(self._is_some_runs)

    def _is_some_runs(self, path: Path) -> bool:
        if self.runs is None:
            return False
        films = any(GrowingVideo.is_at(film, path) for film in self.runs.glob("*/film"))
        return films or is_noted(self.runs, path, self.command)

    def places(self, vae: Path, size: tuple[int, int]) -> RunPlaces:
        """As a run takes them; `size` is (width, height)."""

        def output(folder: Path, grows: Grows) -> Output:
            if self.output.suffix.lower() == ".png":
                picture = self.chosen.pick(self._is_some_runs)
                return Picture(picture, None if self.runs is None else folder.parent, self.command)
            path = self.chosen.pick(lambda path: GrowingVideo.is_at(folder, path))
            made_by = fingerprint(vae)
            return GrowingVideo(folder, path, FRAMES_PER_SECOND, grows=grows, made_by=made_by, tags=self.tags)

        def given() -> Iterator[Tensor]:
            assert self.extend is not None
            return self.extend.checked(read_pieces(self.extend.path, *size, FRAMES_PER_SECOND))

        return RunPlaces(self.runs, self.output.parent, output, None if self.extend is None else given)

    def result(self, run: FramePackRun) -> str:
        """One line on what was made."""
        kept = "" if run.store is None else f"; its sections are kept in {run.store.folder}"
        if not isinstance(run.output, GrowingVideo):
            return f"{self.output}: a picture, {run.sampling.one_frame} latents after the start{kept}"
        return f"{run.output.video}: {run.output.num_frames} frames{kept}"

    def kept(self, run: FramePackRun) -> str:
        """One line on what there is of an unfinished run, and how it goes on."""
        shown = ""
        if isinstance(run.output, GrowingVideo) and run.output.num_shown:
            shown = f"{run.output.video} holds the {run.output.num_shown} frames made so far"
        if run.store is None or not run.completed:
            return shown or "no section was made yet"
        done = f"{run.completed} of {len(run.sections)} sections are kept in {run.store.folder}"
        return f"{done}{shown and f', {shown}'}; the same command goes on from there"


class Picture:
    """A single frame as a PNG."""

    num_sections = 0

    def __init__(self, path: Path, run: Path | None, command: str) -> None:
        self.path, self._run, self._command = path, run, command

    def add(self, frames: Tensor, overlap: int) -> None:
        """Write the first of `frames [T, H, W, 3]`, uint8. OSError as the system's."""
        data = BytesIO()
        Image.fromarray(frames[0].numpy()).save(data, "PNG")
        write_file(self.path, data.getvalue())
        if self._run is not None:
            note_output(self._run, self.path, self._command)

    def begin(self, pieces: Iterable[Tensor], still_open: int) -> None:
        raise AssertionError("a picture extends no video")

    def leave(self) -> None:
        return

    def finish(self) -> None:
        return


def plan_ahead(pipeline: FramePackPipeline, sampling: Sampling, size: tuple[int, int], end_image: bool) -> None:
    """Hold the budget from here on, encoders included; PlanError where the sections will not fit in it.

    `size` is (width, height). The pipeline plans again when it begins: what is free may be less by then.
    """
    model = pipeline.model
    limits = hold_limits(pipeline.settings, model.model.execution)
    height, width = size[1] // SPATIAL_STRIDE, size[0] // SPATIAL_STRIDE
    model.make_plan(section_size(sampling, (height, width), end_image), limits)
