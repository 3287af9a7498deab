"""FramePack on the command line: its own flags, `generate` and `plan`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from PIL import Image

from ..framepack.buckets import MULTIPLE, nearest_bucket
from ..framepack.checkpoint import MODEL_TYPES
from ..framepack.footprint import SectionSize
from ..framepack.inputs import Encoders, Inputs
from ..framepack.pipeline import FramePackPipeline
from ..framepack.request import NUM_STEPS, SAMPLERS, EncodedInputs, Interpolation, Sampling
from ..framepack.run.run import FramePackRun
from ..framepack.sections import (
    FRAMES_PER_LATENT,
    FRAMES_PER_SECOND,
    NUM_HISTORY,
    SectionMode,
    count_sections,
    num_frames,
    plan_one_frame,
)
from ..framepack.streamed import StreamedFramePack
from ..framepack.timed_prompts import TimedPrompt, parse_timed_prompt
from ..memory.plan.footprint import WorkSize
from ..memory.report.report import RunReport
from ..runtime.latent_watch import BadLatents
from ..runtime.settings import RunSettings
from ..vae.frame_watch import BadFrames
from ..video.given_video import GivenVideo
from ..video.pictures import load_image
from ..video.reader import read_end, read_video, video_seconds, video_size
from ..video.writer import SUFFIXES, check_writable
from .arguments import FamilyCommands, fraction, not_negative, positive, runs_folder
from .flags import flag, is_given
from .framepack_run import Files, plan_ahead
from .framepack_source import FramePackSource, OpenedFramePack
from .nag import nag_settings
from .output import OutputFile, command_key
from .report import check_report
from .settings_tag import settings_tags

logger = logging.getLogger(__name__)

# As lllyasviel/FramePack's own demos have them, for base and F1.
DISTILLED_GUIDANCE, TEACACHE, WINDOW, SECONDS = 10.0, 0.15, 9, 5.0
SIZE = (640, 608)  # of a video without a picture

ONE_MODEL = "FramePack has one model for all noise levels"
# Wan's options, and what FramePack has instead.
FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "frames": "FramePack takes --seconds",
        "fps": "FramePack makes 30 frames a second",
        "guidance": "FramePack takes --distilled-guidance, and --cfg for a second pass",
        "guidance_high": ONE_MODEL,
        "boundary": ONE_MODEL,
        "vace_module": "VACE steers Wan models",
        "vace_module_low": "VACE steers Wan models",
        "model_low": ONE_MODEL,
        "lora_low": f"{ONE_MODEL}: give --lora",
        "spacing": "FramePack's noise levels follow --steps and --shift",
        "timesteps": "FramePack's noise levels follow --steps and --shift",
        "batch_cfg": "FramePack makes the two passes of --cfg in turn",
        "control": "FramePack is steered by pictures and --video",
        "control_strength": "FramePack takes no control video",
        "reference": "FramePack takes --image and --end-image",
        "step_cache": "FramePack's step cache is --teacache",
        "decoder": "tiny decoders make drafts of Wan videos; FramePack's sections are decoded by --vae",
    }
)
# Options that one option rules out, as there is nothing for them to act on.
CONFLICTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("one_frame", ("seconds", "end_image", "extend", "video"), "--one-frame makes a single picture"),
    ("extend", ("video",), "a video is gone on from or changed, not both"),
)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Flags that FramePack alone has; none has a default, so that Wan can refuse them."""
    own = parser.add_argument_group("FramePack only")
    own.add_argument("--clip-l", type=Path, help="CLIP-L text encoder, beside --text-encoder llava_llama3")
    own.add_argument("--tokenizers", type=Path, metavar="FOLDER", help="left out: beside the text encoders")
    own.add_argument("--model-type", choices=["auto", *MODEL_TYPES], help="auto: by the file's metadata or name")
    own.add_argument("--seconds", type=positive, help=f"rounded to whole sections ({SECONDS:g}, or as long as --video)")
    own.add_argument("--window", type=int, metavar="LATENTS", help=f"per section ({WINDOW}); fewer take less memory")
    own.add_argument(
        "--cross-fade", type=not_negative, metavar="SECONDS", help="between timed prompts: [2s: she waves]"
    )
    own.add_argument("--extend", type=Path, metavar="VIDEO", help="a video to go on from (F1 models)")
    own.add_argument("--video", type=Path, metavar="VIDEO", help="a video to change, by --strength")
    own.add_argument("--strength", type=fraction, help="0 keeps the video, 1 makes a new one")
    own.add_argument("--image-strength", type=fraction, help="how much the start image's features count (1)")
    own.add_argument(
        "--embed-interpolation",
        choices=get_args(Interpolation),
        help="features between --image and --end-image: linear glides (default), weighted_average by --image-strength",
    )
    own.add_argument("--one-frame", type=int, metavar="N", help="a PNG instead of a video, N latents after --image")
    own.add_argument("--distilled-guidance", type=not_negative, help=f"({DISTILLED_GUIDANCE:g})")
    own.add_argument("--cfg", type=not_negative, help="above 1: a second pass with --negative-prompt (1)")
    cache = own.add_mutually_exclusive_group()
    cache.add_argument("--teacache", type=not_negative, metavar="THRESHOLD", help=f"steps skip blocks ({TEACACHE})")
    cache.add_argument("--no-teacache", action="store_true", help="compute every step")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Flags of `plan` that FramePack alone has."""
    own = parser.add_argument_group("FramePack only")
    own.add_argument("--window", type=int, metavar="LATENTS", help=f"per section ({WINDOW})")
    own.add_argument("--cfg", type=not_negative, help="above 1: two passes per step")
    own.add_argument("--no-teacache", action="store_true", help="without the step cache and its memory")


def open_model(options: argparse.Namespace, settings: RunSettings) -> StreamedFramePack:
    """The model that `plan` is of."""
    return StreamedFramePack(options.model, settings)


def planned_work(options: argparse.Namespace, model: StreamedFramePack) -> WorkSize:
    """The work of a section of these options, for `plan`."""
    window = WINDOW if options.window is None else options.window
    count_sections(SECONDS, window)  # refuses a window that no section has
    width, height = _given_size(options) or SIZE
    passes = 2 if options.cfg not in (None, 1.0) else 1
    return SectionSize(
        num_frames(window), height, width, passes_per_step=passes, step_cache=not options.no_teacache
    )  # fmt: skip


def source(options: argparse.Namespace) -> FramePackSource:
    """The files and the machine's settings of these options. ValueError where one is missing, or flags clash."""
    _timed_prompt(options)
    _check_combination(options)
    return FramePackSource.of(options)


def check(opened: OpenedFramePack, options: argparse.Namespace) -> None:
    """Refuse what `make` could not make, or not write."""
    _planned(opened, options)


def make(opened: OpenedFramePack, options: argparse.Namespace) -> RunReport:
    """Make one video that grows section by section, or one picture; what is done is kept and gone on from."""
    job = _planned(opened, options)
    for lora in job.pipeline.lora_reports():
        print(lora.summary)  # what was not applied is in the log
    with job.pipeline.record.run():
        _make(job)
    return job.pipeline.report()


def _planned(opened: OpenedFramePack, options: argparse.Namespace) -> _Job:
    job = _Job.of(opened, options)
    plan_ahead(job.pipeline, job.sampling, job.size, options.end_image is not None)
    return job


def _make(job: _Job) -> None:
    try:
        inputs = job.encode()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted before the first step: no section was made") from None
    files, pipeline = job.files, job.pipeline
    places = files.places(pipeline.files.vae, job.size)
    with files.chosen, FramePackRun.open(pipeline, job.sampling, inputs, places) as run:
        try:
            run.make()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {files.kept(run)}") from None
        except (RuntimeError, OSError, BadLatents, BadFrames):  # out of memory, a full disk, a section that is no use
            print(files.kept(run))
            raise
        print(files.result(run))


@dataclass(frozen=True)
class _Job:
    """A request that was checked as far as headers and flags tell, with its files opened."""

    options: argparse.Namespace
    pipeline: FramePackPipeline
    encoders: Encoders
    sampling: Sampling
    timed: TimedPrompt
    size: tuple[int, int]
    files: Files
    video: GivenVideo | None  # that is changed

    @classmethod
    def of(cls, opened: OpenedFramePack, options: argparse.Namespace) -> _Job:
        """ValueError or CheckpointError, before anything is loaded or written, for what cannot be made."""
        timed = _timed_prompt(options)
        pipeline, encoders = opened.pipeline, opened.encoders
        mode = pipeline.model.mode
        if options.extend is not None and mode != "f1":
            raise ValueError(
                f"--extend goes on from the end of a video, and {options.model.name} is a base model, which works from "
                "the end to the start: choose an F1 model (--model-type f1 if it is one and its name does not say so)"
            )
        video, extend = (None if path is None else GivenVideo(path) for path in (options.video, options.extend))
        size = _size(options)
        sampling = _sampling(options, mode)
        return cls(options, pipeline, encoders, sampling, timed, size, _places(options, extend), video)

    def encode(self) -> EncodedInputs:
        """What the video is made of."""
        inputs = self._inputs()
        with self.pipeline.record.phase("encode"):
            return self.encoders.encode(inputs, self.pipeline.model.config)

    def _inputs(self) -> Inputs:
        options, (width, height) = self.options, self.size
        pictures = (options.image, options.end_image)
        start, end = (None if path is None else load_image(path, width, height) for path in pictures)
        initial, given, given_after = None, None, 0.0
        if self.video is not None:
            num_sections = count_sections(self.sampling.seconds, self.sampling.window)
            length = 1 + FRAMES_PER_LATENT * self.sampling.window * num_sections
            video = read_video(self.video.path, width, height, FRAMES_PER_SECOND, first=length)
            self.video.check()  # its size and length are known from before
            initial = video[: _whole(len(video))]
        extend = self.files.extend
        if extend is not None:
            # what sections see of the video, and what the first one is faded into
            last = num_frames(max(NUM_HISTORY, self.sampling.window))
            video, num_before = read_end(extend.path, width, height, FRAMES_PER_SECOND, last)
            extend.check()
            given = video[-_whole(len(video)) :]
            given_after = (num_before + len(video) - len(given)) / FRAMES_PER_SECOND
        wants_negative = self.sampling.cfg != 1.0 or self.sampling.nag is not None
        negative = (options.negative_prompt or "") if wants_negative else None
        return Inputs(
            self.timed,
            self.size,
            negative,
            start,
            end,
            initial,
            given,
            given_after,
            1.0 if options.image_strength is None else options.image_strength,
            options.embed_interpolation or "linear",
        )


# --- from flags ------------------------------------------------------------------------------------------


def _timed_prompt(options: argparse.Namespace) -> TimedPrompt:
    if not options.prompt.strip():
        raise ValueError("the prompt is empty: say what the video shows, such as 'a woman dances [2s: she waves]'")
    timed = parse_timed_prompt(options.prompt, options.cross_fade or 0.0)
    if options.cross_fade is not None and not timed.parts:
        raise ValueError("--cross-fade has nothing to fade: give the prompt timed parts, such as [2s: she waves]")
    return timed


def _check_combination(options: argparse.Namespace) -> None:
    for option, others, why in CONFLICTS:
        if clash := [other for other in others if is_given(options, option) and is_given(options, other)]:
            raise ValueError(f"{flag(option)} and {flag(clash[0])} exclude each other: {why}; leave one out")
    if is_given(options, "video") != is_given(options, "strength"):
        raise ValueError(
            "--video and --strength belong together: give the video to change, and how much (0 keeps it, 1 makes a "
            "new one; 0.6 is a start)"
        )
    if options.embed_interpolation is not None and options.end_image is None:
        raise ValueError("--embed-interpolation has nothing to go to: give --end-image too, or leave it out")
    if options.image_strength is not None and not any(
        is_given(options, option) for option in ("image", "extend", "video")
    ):
        raise ValueError("--image-strength has no picture to act on: give --image, or leave it out")
    if options.negative_prompt and options.cfg in (None, 1.0) and nag_settings(options) is None:
        logger.warning("the negative prompt is not read: it takes --cfg above 1, or --nag")


def _given_size(options: argparse.Namespace) -> tuple[int, int] | None:
    """--width and --height, checked."""
    width, height = options.width, options.height
    if width is None and height is None:
        return None
    if width is None or height is None:
        raise ValueError("--width and --height belong together: give both, or none for the picture's nearest bucket")
    if width % MULTIPLE or height % MULTIPLE or min(width, height) < MULTIPLE:
        nearest = [max(1, round(side / MULTIPLE)) * MULTIPLE for side in (width, height)]
        raise ValueError(
            f"{width}x{height} cannot be made: FramePack needs sides that are multiples of {MULTIPLE}; "
            f"use {nearest[0]}x{nearest[1]}"
        )
    return width, height


def _size(options: argparse.Namespace) -> tuple[int, int]:
    """Width and height: those given, or the bucket nearest to the aspect of what the video starts or ends at."""
    # read even where a size is given: a file that is no picture or video is refused before hours are spent
    sizes = [_picture_size(path) for path in (options.image, options.end_image) if path is not None]
    sizes += [video_size(path) for path in (options.video, options.extend) if path is not None]
    given = _given_size(options)
    if given is not None:
        return given
    return nearest_bucket(*sizes[0]) if sizes else SIZE


def _picture_size(path: Path) -> tuple[int, int]:
    load_image(path, MULTIPLE, MULTIPLE)  # refuses what is no picture
    with Image.open(path) as picture:
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # Orientation: lying on its side
        return (picture.height, picture.width) if turned else picture.size


def _sampling(options: argparse.Namespace, mode: SectionMode) -> Sampling:
    sampler = options.sampler or SAMPLERS[0]
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler} does not apply to FramePack models: use {', '.join(SAMPLERS)}")
    seconds = options.seconds
    if seconds is None:  # as long as the video to change, if its file says how long that is
        seconds = (0.0 if options.video is None else video_seconds(options.video)) or SECONDS
    sampling = Sampling(
        seconds=seconds,
        mode=mode,
        window=WINDOW if options.window is None else options.window,
        num_steps=NUM_STEPS if options.steps is None else options.steps,
        sampler=sampler,
        guidance=DISTILLED_GUIDANCE if options.distilled_guidance is None else options.distilled_guidance,
        cfg=1.0 if options.cfg is None else options.cfg,
        shift=options.shift or 0.0,
        seed=options.seed,
        cache_threshold=None if options.no_teacache else TEACACHE if options.teacache is None else options.teacache,
        strength=1.0 if options.strength is None else options.strength,
        one_frame=options.one_frame,
        nag=nag_settings(options),
    )
    sampling.check()
    count_sections(sampling.seconds, sampling.window)
    if sampling.one_frame is not None:
        plan_one_frame(sampling.one_frame)
    return sampling


def _places(options: argparse.Namespace, extend: GivenVideo | None) -> Files:
    """Where output and runs go; the output's folder is made."""
    picture = options.one_frame is not None
    chosen = OutputFile(options.output, Path(f"output/{'picture.png' if picture else 'video.mp4'}"), options.overwrite)
    output = chosen.path
    suffixes = (".png",) if picture else SUFFIXES
    if output.suffix.lower() not in suffixes:
        kind = "picture" if picture else "video"
        raise ValueError(f"{output} is no {kind} file name: end it in {' or '.join(suffixes)}")
    chosen.check_sources(options)
    check_report(options.report)
    check_writable(output)
    runs, tags = runs_folder(options, output, "framepack"), settings_tags(options)
    files = Files(chosen, command_key(options), runs, tags, extend)
    files.check()
    return files


def _whole(num_video_frames: int) -> int:
    """How many of a video's frames the VAE takes: 4n + 1."""
    return (num_video_frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1


FRAMEPACK_COMMANDS = FamilyCommands(
    "FramePack models", FOREIGN, add_generate, add_plan, source, OpenedFramePack, check, make, planned_work, open_model
)
