"""`lowvram-video upscale`: a finished video made two to four times as large."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..runtime.latent_watch import BadLatents
from ..vae.frame_watch import BadFrames
from ..video.writer import VideoError
from ..wanvideo.upscale.colour import COLOUR_FIXES
from ..wanvideo.upscale.film import GOOD_CRF, FilmPlace, UpscaleFilm
from ..wanvideo.upscale.request import LOCAL_RANGES, SCALES, VERSIONS, UpscaleRequest, files_of
from ..wanvideo.upscale.run import Upscaler
from ..wanvideo.upscale.source import VideoFile
from .arguments import add_keeping, add_machine, add_seed, lora_choice, not_negative, runs_folder, settings_of
from .output import OutputFile, add_overwrite
from .progress import TerminalProgress
from .report import check_report, show_report
from .settings_tag import add_metadata, settings_tags


def add_upscale(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("video", type=Path, help="MP4, MOV, MKV or WebM; its rate and sound are kept")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", type=Path, required=True,
        help="FlashVSR's transformer: FlashVSR1_1, Wan2_1-T2V-1.1_3B_FlashVSR_…, diffusion_pytorch_model_streaming_dmd",
    )  # fmt: skip
    files.add_argument("--projection", type=Path, help="LQ_proj_in (left out: the one beside the model)")
    files.add_argument("--decoder", type=Path, help="TCDecoder (left out: the one beside the model)")
    files.add_argument("--prompt-file", type=Path, help="Prompt.safetensors (left out: the one beside the model)")
    files.add_argument(
        "--lora", type=lora_choice, action="append", default=[], metavar="FILE:STRENGTH",
        help="a LoRA for the transformer (strength left out: 1); may be given several times",
    )  # fmt: skip
    files.add_argument("-o", "--output", type=Path, help="(output/NAME_x2.mp4, numbered where that is there)")
    what = parser.add_argument_group("what to make")
    what.add_argument("--scale", type=int, choices=SCALES, default=2, help="how many times as large (2)")
    add_seed(what)
    what.add_argument(
        "--flashvsr", choices=VERSIONS, default="1.1", help="which version the files are of: they do not tell (1.1)"
    )
    what.add_argument(
        "--colour",
        choices=list(COLOUR_FIXES),
        default="adain",
        help="how colours stay those of the small video (adain)",
    )
    what.add_argument(
        "--sparse-ratio", type=not_negative, default=2.0,
        help="how much attention sees: 2 (published), 1.5 is faster, 0 is all, which its authors found worse",
    )  # fmt: skip
    what.add_argument(
        "--local-range", type=int, choices=LOCAL_RANGES, default=11, help="9: sharper details, 11: steadier ones"
    )
    what.add_argument("--kept-windows", type=int, default=3, help="of 8 frames, remembered in RAM")
    what.add_argument("--crf", type=int, default=GOOD_CRF, help="x264's quality, 0 (best) to 51")
    add_keeping(parser, "keeps what was made until the video is whole (upscale, beside --output)")
    add_machine(parser)
    add_overwrite(files)
    add_metadata(files)
    parser.set_defaults(command=upscale)


def upscale(options: argparse.Namespace) -> None:
    """Make one video larger, its frames written as they come."""
    source = VideoFile(options.video)
    request = UpscaleRequest(
        options.scale, options.seed, options.flashvsr, options.colour, options.sparse_ratio, options.local_range,
        options.kept_windows,
    )  # fmt: skip
    request.check()
    check_report(options.report)
    progress = TerminalProgress(sys.stderr)
    files = files_of(options.model, options.projection, options.decoder, options.prompt_file)
    files = replace(files, loras=tuple(options.lora))
    upscaler = Upscaler(files, settings_of(options), progress, progress.block)
    for lora in upscaler.lora_reports():
        print(lora.summary)  # what was not applied is in the log
    default = Path("output") / f"{options.video.stem}_x{options.scale}.mp4"
    with OutputFile(options.output, default, options.overwrite) as output:
        _make(UpscaleFilm(upscaler, source, request), options, output)
    show_report(upscaler.report(), options)


def _make(film: UpscaleFilm, options: argparse.Namespace, chosen: OutputFile) -> None:
    runs, tags = runs_folder(options, chosen.path, "upscale"), settings_tags(options)
    wanted = FilmPlace(chosen.path, runs, options.crf, tags)
    path = chosen.pick(lambda path: film.is_own(wanted, path))
    if path.exists() and path.samefile(options.video):
        raise ValueError(f"{path} is the video itself: choose another name for --output")
    try:
        film.make(FilmPlace(path, runs, options.crf, tags))
    except KeyboardInterrupt:
        shown = f"{path} holds the frames made so far" if path.exists() else "no frame was made yet"
        raise KeyboardInterrupt(f"interrupted: {shown}{_goes_on(film)}") from None
    except (RuntimeError, VideoError, BadLatents, BadFrames):
        if said := _goes_on(film):
            print(said.removeprefix(", "))
        raise
    print(f"{path}: {film.num_frames} frames")


def _goes_on(film: UpscaleFilm) -> str:
    """How a run that was stopped goes on; nothing where nothing is kept."""
    if film.folder is None or not any(film.folder.glob("state_*")):
        return ""
    return f", the run is kept in {film.folder}; the same command goes on from there"
