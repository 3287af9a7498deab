"""Wan on the command line: its own flags, `generate` and `plan`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..memory.plan.footprint import WorkSize
from ..memory.report.report import RunReport
from ..runtime.latent_watch import BadLatents
from ..runtime.progress import Progress
from ..runtime.settings import RunSettings
from ..sampling.guidance import batch_and_passes
from ..sampling.schedules import SPACINGS
from ..system.output_lock import is_noted, note_output
from ..vae.frame_watch import BadFrames
from ..video.reader import video_frames
from ..video.writer import VideoWriter, check_video
from ..wanvideo.footprint import wan_work
from ..wanvideo.identity import WanFiles
from ..wanvideo.pipeline import WanPipeline
from ..wanvideo.request import NEGATIVE_PROMPT, WanRequest, check_size, plan_defaults
from ..wanvideo.streamed import StreamedWan
from ..wanvideo.vae.model import WAN21_VAE, WAN22_VAE
from .arguments import (
    FamilyCommands,
    WantedFile,
    lora_choice,
    not_negative,
    numbers,
    positive,
    runs_folder,
    settings_of,
)
from .flags import flag, is_given
from .nag import nag_settings
from .output import OutputFile, command_key
from .report import check_report
from .settings_tag import settings_tags

logger = logging.getLogger(__name__)

SOURCE = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
TEXT_ENCODER = WantedFile("text_encoder", "a umt5-xxl encoder", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", SOURCE)
VAE = WantedFile("vae", "a Wan VAE", "wan_2.1_vae.safetensors (TI2V 5B: wan2.2_vae.safetensors)", SOURCE)

ONE_PIECE = "Wan makes a video in one piece"
# FramePack's options, and what Wan has instead.
FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "seconds": "Wan takes --frames",
        "window": f"{ONE_PIECE}, of --frames",
        "cfg": "Wan takes --guidance",
        "distilled_guidance": "Wan takes --guidance",
        "clip_l": "Wan has one text encoder, --text-encoder",
        "tokenizers": "Wan's tokenizer is in its text encoder, or a spiece.model beside it",
        "cross_fade": "Wan has one prompt for the whole video",
        "extend": "only FramePack F1 models go on from a video",
        "video": "only FramePack models begin from a video here",
        "strength": "only FramePack models begin from a video here",
        "one_frame": "for a single picture give --frames 1",
        "image_strength": "Wan is given the picture itself",
        "embed_interpolation": "Wan is given the pictures themselves",
        "teacache": "it is FramePack's step cache",
        "no_teacache": "it is FramePack's step cache",
        "model_type": "it tells FramePack's base and F1 models apart",
    }
)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Flags that Wan alone has; none has a default, so that FramePack can refuse them."""
    wan = parser.add_argument_group("Wan only")
    wan.add_argument("--model-low", type=Path, help="the low-noise expert of Wan 2.2 A14B")
    wan.add_argument(
        "--lora-low", type=lora_choice, action="append", default=[], metavar="FILE:STRENGTH",
        help="a LoRA for the low-noise expert",
    )  # fmt: skip
    _add_vace_module(wan)
    wan.add_argument("--vace-module-low", type=Path, help="the same for the low-noise expert")
    wan.add_argument("--control", type=Path, metavar="VIDEO", help="a video that steers, such as depth (VACE, Fun)")
    wan.add_argument("--control-strength", type=not_negative, help="how much it does (VACE; 1)")
    wan.add_argument("--reference", type=Path, metavar="PICTURE", help="what shall be seen (VACE, Fun)")
    wan.add_argument(
        "--decoder", type=Path, help="a tiny decoder for a draft, in place of the VAE's: taew2_1, lighttaew2_1, taew2_2"
    )
    wan.add_argument("--frames", type=int, help="4n + 1")
    wan.add_argument("--fps", type=positive, help="frames a second (16; TI2V 5B: 24)")
    wan.add_argument("--spacing", choices=list(SPACINGS), help="of noise levels: Wan's (uniform) or ComfyUI's")
    wan.add_argument("--timesteps", type=numbers, help="a distilled model's own list, e.g. 1000,937.5,833.3,625")
    wan.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 turns it off")
    wan.add_argument("--guidance-high", type=float, help="the same for the high-noise expert")
    wan.add_argument("--boundary", type=float, help="sigma where the low-noise expert takes over")
    wan.add_argument("--batch-cfg", action="store_true", help="cond and uncond in one batch instead of in turn")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Flags of `plan` that Wan alone has."""
    wan = parser.add_argument_group("Wan only")
    _add_vace_module(wan)
    wan.add_argument("--frames", type=int, help="4n + 1")
    wan.add_argument("--batch-cfg", action="store_true", help="cond and uncond in one batch")
    wan.add_argument("--cfg-1", action="store_true", help="no guidance: one pass per step, as distilled models run")


def _add_vace_module(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--vace-module", type=Path, help="VACE's blocks in a file of their own (Wan2_1-VACE_module_…), for a T2V model"
    )


@dataclass(frozen=True)
class WanSource:
    """What a video is made with."""

    files: WanFiles
    settings: RunSettings


def source(options: argparse.Namespace) -> WanSource:
    """The files and the machine's settings of these options. ValueError where one is missing."""
    loras = tuple(options.lora), tuple(options.lora_low)
    text_encoder, vae = (file.required(options, options.model.name) for file in (TEXT_ENCODER, VAE))
    files = WanFiles(
        options.model,
        text_encoder,
        vae,
        options.model_low,
        *loras,
        options.vace_module,
        options.vace_module_low,
        options.clip_vision,
        options.decoder,
    )
    return WanSource(files, settings_of(options))


def open_source(source: WanSource, progress: Progress) -> WanPipeline:
    """The pipeline of these files, headers read."""
    return WanPipeline(source.files, source.settings, progress, between_blocks=progress.block)


def check(pipeline: WanPipeline, options: argparse.Namespace) -> None:
    """Refuse what `make` could not make, or not write."""
    check_report(options.report)
    chosen = _output_of(options)
    check_video(chosen.path)
    chosen.check(_is_own(options, chosen))
    pipeline.check(_request(options))


def make(pipeline: WanPipeline, options: argparse.Namespace) -> RunReport:
    """Make one video, its frames written as they are decoded."""
    for lora in pipeline.lora_reports():
        print(lora.summary)  # what was not applied is in the log
    check_report(options.report)
    _tell_unread(options, _request(options).completed(pipeline.defaults))
    with _output_of(options) as output:
        return _make(pipeline, options, output)


def _tell_unread(options: argparse.Namespace, request: WanRequest) -> None:
    """Warn of what was given and counts for nothing in this completed request."""
    listed = [flag(option) for option in ("steps", "shift", "spacing") if is_given(options, option)]
    if options.timesteps is not None and listed:
        logger.warning(
            "%s %s not read: --timesteps is the list of all steps", ", ".join(listed), "are" if listed[1:] else "is"
        )
    if options.negative_prompt and not request.hears_negative:
        logger.warning("the negative prompt is not read: it takes --guidance other than 1, or --nag")


def _output_of(options: argparse.Namespace) -> OutputFile:
    chosen = OutputFile(options.output, Path("output/video.mp4"), options.overwrite)
    chosen.check_sources(options)
    return chosen


def _is_own(options: argparse.Namespace, chosen: OutputFile) -> Callable[[Path], bool]:
    """Whether a run that is kept, of these very options, has shown the file that is there."""
    runs, key = runs_folder(options, chosen.path, "wan"), command_key(options)
    return lambda path: runs is not None and is_noted(runs, path, key)


def _make(pipeline: WanPipeline, options: argparse.Namespace, chosen: OutputFile) -> RunReport:
    key = command_key(options)
    pipeline.runs = runs_folder(options, chosen.path, "wan")
    output = chosen.pick(_is_own(options, chosen))
    writer = VideoWriter(output, options.fps or pipeline.defaults.fps, tags=settings_tags(options))
    try:
        with writer:
            try:
                for frames in pipeline.generate(_request(options)):
                    writer.write(frames)
            except BadFrames:
                writer.discard()
                raise
    except KeyboardInterrupt:
        _note(pipeline, writer, key)
        shown = f"{output} holds the {_num_shown(writer)} frames made so far" if writer.is_shown else ""
        said = ", ".join(filter(None, (shown, _kept(pipeline))))
        raise KeyboardInterrupt(f"interrupted: {said or 'no frame was made yet'}") from None
    except (RuntimeError, OSError, BadLatents, BadFrames):  # out of memory, no room on the disk, steps that are no use
        _note(pipeline, writer, key)
        if said := _kept(pipeline):
            print(said)
        raise
    pipeline.forget()
    print(f"{output}: {writer.num_frames} frames")
    return pipeline.report()


def _num_shown(writer: VideoWriter) -> int:
    """By the file: an interrupt may come between a frame that is written and its being counted."""
    try:
        return video_frames(writer.path)
    except ValueError:  # somebody has moved it
        return writer.num_frames


def _note(pipeline: WanPipeline, writer: VideoWriter, key: str) -> None:
    """Have the run know the frames that it leaves: when it goes on they may be replaced."""
    if pipeline.steps is not None and pipeline.steps.is_finished and writer.num_frames:
        with suppress(OSError):  # the disk is full, or the video is gone: then its name is refused
            note_output(pipeline.steps.folder, writer.path, key)


def _kept(pipeline: WanPipeline) -> str:
    """What there is of an unfinished run, and how it goes on; nothing where nothing is kept."""
    steps = pipeline.steps
    if steps is None or not (steps.num_kept or steps.is_finished):
        return ""
    what = "all steps are" if steps.is_finished else f"{steps.num_kept} steps are"
    return f"{what} kept in {steps.folder}; the same command goes on from there"


def planned_work(options: argparse.Namespace, model: StreamedWan) -> WorkSize:
    """The work of a video of these options, for `plan`."""
    request = WanRequest("any", width=options.width, height=options.height, num_frames=options.frames)
    size = request.completed(plan_defaults(model.config)).size
    vae = WAN22_VAE if model.config.out_channels == WAN22_VAE.z_dim else WAN21_VAE
    check_size(vae, model.config.patch_size[1], *size)
    return wan_work(model.config, size, *batch_and_passes(not options.cfg_1, options.batch_cfg))


def open_model(options: argparse.Namespace, settings: RunSettings) -> StreamedWan:
    """The model that `plan` is of."""
    return StreamedWan(options.model, settings, vace_module=options.vace_module)


def _request(options: argparse.Namespace) -> WanRequest:
    negative = options.negative_prompt
    return WanRequest(
        prompt=options.prompt,
        negative_prompt=NEGATIVE_PROMPT if negative is None else negative,
        width=options.width,
        height=options.height,
        num_frames=options.frames,
        seed=options.seed,
        num_steps=options.steps,
        sampler=options.sampler or "unipc",
        spacing=options.spacing or "uniform",
        shift=options.shift,
        guidance=options.guidance,
        guidance_high=options.guidance_high,
        boundary=options.boundary,
        timesteps=options.timesteps,
        image=options.image,
        end_image=options.end_image,
        nag=nag_settings(options),
        control=options.control,
        reference=options.reference,
        control_strength=options.control_strength,
        control_fps=options.fps,
    )


WAN_COMMANDS = FamilyCommands(
    "Wan models", FOREIGN, add_generate, add_plan, source, open_source, check, make, planned_work, open_model
)
