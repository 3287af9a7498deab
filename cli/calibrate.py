"""`lowvram-video calibrate`: the table of a step cache, measured of a Wan model's own runs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..sampling.caching.tables import CacheTable, TableError, read_table
from ..wanvideo.calibrate import calibrate as measure
from ..wanvideo.identity import WanFiles
from ..wanvideo.pipeline import WanPipeline
from ..wanvideo.request import WanRequest
from ..wanvideo.step_tables import own_table
from ..weights.files.open import open_checkpoint
from .arguments import add_machine, add_seed, add_size, lora_choice, settings_of
from .flags import is_given
from .output import check_replaced
from .progress import TerminalProgress
from .sparse import add_sparse
from .wan import TEXT_ENCODER, VAE

PROMPTS = (
    "A red fox trots through fresh snow at the edge of a pine forest, the camera follows it",
    "A woman in a green coat turns her head and smiles, city lights behind her",
    "Waves break on black rocks at sunset, seen from above",
)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """The flags of `calibrate`."""
    files = parser.add_argument_group("files")
    files.add_argument("--model", type=Path, required=True, help="Wan transformer (Wan 2.2 A14B: the high-noise one)")
    files.add_argument("--model-low", type=Path, help="the low-noise expert of Wan 2.2 A14B: a table for each")
    files.add_argument("--text-encoder", type=Path, help="umt5-xxl")
    files.add_argument("--vae", type=Path, help="the model's, for its size alone")
    files.add_argument(
        "--lora", type=lora_choice, action="append", default=[], metavar="FILE:STRENGTH", help="a LoRA that you use"
    )
    files.add_argument("-o", "--output", type=Path, metavar="FILE", help="of the table (beside the model's file)")
    runs = parser.add_argument_group("the runs that are measured, as long as videos of yours (no step is skipped)")
    runs.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times (three of ours)")
    runs.add_argument("--negative-prompt", metavar="TEXT", help="(Wan's own)")
    add_size(runs)
    runs.add_argument("--frames", type=int, help="4n + 1")
    runs.add_argument("--steps", type=int, help="as many as you use, 10 or more (the model's published number)")
    runs.add_argument("--shift", type=float, help="above 1: more of the steps at high noise")
    runs.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 turns it off")
    add_seed(runs)
    add_machine(parser)
    add_sparse(parser)
    parser.set_defaults(command=calibrate)


def calibrate(options: argparse.Namespace) -> None:
    """Measure the model and write its table, which step caches find beside its file."""
    if is_given(options, "output") and options.model_low is not None:
        raise ValueError("--output is one file, and two experts have a table each: leave it out, or --model-low")
    for path in filter(None, (options.model, options.model_low)):
        open_checkpoint(path)  # a name that is none is told before what is missing beside it
        check_replaced(options.output or own_table(path), "table of a step cache", _is_table)
    files = WanFiles(
        options.model,
        TEXT_ENCODER.required(options, options.model.name),
        VAE.required(options, options.model.name),
        options.model_low,
        tuple(options.lora),
    )
    progress = TerminalProgress(sys.stderr)
    pipeline = WanPipeline(files, replace(settings_of(options), keep_loaded=True), progress, None, progress.block)
    for path, table in measure(pipeline, _requests(options)).items():
        target = options.output or own_table(path)
        table.save(target)
        print(_told(target, table))


def _is_table(path: Path) -> bool:
    try:
        read_table(path)
    except TableError:
        return False
    return True


def _requests(options: argparse.Namespace) -> list[WanRequest]:
    request = WanRequest(
        "",
        width=options.width,
        height=options.height,
        num_frames=options.frames,
        num_steps=options.steps,
        shift=options.shift,
        guidance=options.guidance,
    )
    if options.negative_prompt is not None:
        request = replace(request, negative_prompt=options.negative_prompt)
    prompts = options.prompt or PROMPTS
    return [replace(request, prompt=prompt, seed=options.seed + number) for number, prompt in enumerate(prompts)]


def _told(path: Path, table: CacheTable) -> str:
    tea, mag = table.teacache, table.magcache
    assert tea is not None and mag is not None
    return (
        f"{path}: {len(mag.cond)} steps of {table.name}; usual thresholds teacache {tea.threshold:g}, "
        f"magcache {mag.threshold:g}"
    )
