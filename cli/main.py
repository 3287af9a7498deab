"""The command line: `lowvram-video generate | batch | upscale | plan | bench | doctor | inspect | …`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..demo.show import make_demo
from ..families.identify import describe, identify
from ..families.table import family_of
from ..memory.plan.limits import limits_for, with_card
from ..memory.plan.table import assumed_rates
from ..memory.plan.table import describe as describe_plan
from ..runtime.settings import RunSettings, use_device
from ..system.card_profile import CardProfile, load_profile
from ..system.plain_text import printable
from ..system.sizes import in_gib
from ..system.version import version
from ..weights.files.open import open_checkpoint
from ..weights.linear.convert import FILE_FORMATS, convert, parts_left_out
from .arguments import add_device, add_seed, add_size, positive
from .batch import add_batch
from .bench import add_bench
from .cache import add_cache
from .calibrate import add_calibrate
from .console import plain_console
from .doctor import add_doctor
from .examples import PROGRAM, examples_of
from .failure import failure
from .generate import COMMANDS, add_generate, family_of_file
from .output import OutputFile, add_overwrite
from .parser import BAD_INPUT, CommandParser
from .progress import TerminalProgress
from .step_cache import add_step_cache, step_cache_of
from .upscale import add_upscale

INTERRUPTED = 130  # as shells have it for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 with one line on stderr that says what to do, or 130 after Ctrl-C.

    `batch` ends with 1 where some of its jobs failed, `doctor` where something does not work.

    SIGTERM ends it as Ctrl-C does: with what was made by then.
    """
    with plain_console():
        return _run(make_parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    if sys.platform == "linux":  # elsewhere PyTorch does not know it; read when the GPU is first used
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    command: Callable[[argparse.Namespace], int | None] = options.command
    try:
        with torch.inference_mode(), _terminable():
            return command(options) or 0
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted", INTERRUPTED)
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        said = failure(error)
        if said is None:
            raise
        return _fail(said)


def make_parser() -> CommandParser:
    """All commands and flags."""
    parser = CommandParser(
        prog=PROGRAM,
        description="Wan and FramePack video on small graphics cards",
        epilog=examples_of(""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version()}", help="say which version it is")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is chosen and why")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=examples_of(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    add_generate(command("generate", "make a video from checkpoint files and a prompt"))
    add_batch(command("batch", "make many videos: on all cards, on a Ray cluster, on ComfyUI servers"))
    add_upscale(command("upscale", "make a finished video two to four times as large, with FlashVSR"))
    _add_plan(command("plan", "show what a run would use, without a GPU"))
    add_bench(command("bench", "measure this card, so that plans tell its times"))
    add_calibrate(command("calibrate", "measure a Wan model for step caches, so that they know what to skip"))
    add_cache(command("cache", "show what torch.compile and Triton have kept on the disk, or delete it"))
    add_doctor(command("doctor", "try what this machine has, and say what to install"))
    _add_inspect(command("inspect", "say what a checkpoint file is"))
    _add_convert(command("convert", "write a quantised copy of a checkpoint"))
    _add_demo(command("demo", "make a video with the pack's own tiny model"))
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="Wan or FramePack transformer; only its header is read")
    add_size(parser)
    parser.add_argument(
        "--vram-budget", type=positive, metavar="GIB", required=True,
        help="what the run may use: half a GiB less than the card has, where it shows the desktop",
    )  # fmt: skip
    parser.add_argument("--ram-budget", type=positive, metavar="GIB", help="smaller than the model: stream from disk")
    parser.add_argument(
        "--blocks-to-swap", type=int, default=-1, metavar="N", help="-1: planned; else how many blocks stream"
    )
    parser.add_argument("--no-triton", action="store_true", help="plan for a machine where Triton does not run")
    parser.add_argument(
        "--card", type=Path, metavar="FILE",
        help="what `bench` measured of another card, such as one of benchmarks/cards (left out: of this one)",
    )  # fmt: skip
    for commands in COMMANDS.values():
        commands.add_plan(parser)
    add_step_cache(parser)
    parser.set_defaults(command=plan)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="safetensors, GGUF, the index of shards, or their folder")
    parser.set_defaults(command=inspect)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="Wan or FramePack transformer, best in 16 bits")
    parser.add_argument("target", type=Path, help="a new .safetensors file")
    parser.add_argument(
        "--to", choices=list(FILE_FORMATS), required=True,
        help="fp8: a scale per layer; fp8_rows: per row, more accurate and not for ComfyUI; int8: per row",
    )  # fmt: skip
    add_device(parser)
    parser.set_defaults(command=convert_file)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, help="(output/demo.mp4, numbered where that is there)")
    add_overwrite(parser)
    add_seed(parser)
    add_device(parser, "cpu")
    parser.set_defaults(command=demo)


def plan(options: argparse.Namespace) -> None:
    """Print how a run would use a card that need not be in this machine."""
    family = family_of_file(options.model)
    COMMANDS[family].refuse_foreign(options)
    model = COMMANDS[family].open_model(options, RunSettings(dtype=torch.bfloat16, step_cache=step_cache_of(options)))
    limits = limits_for(
        torch.device("cuda"),
        vram_budget_gib=options.vram_budget,
        ram_budget_gib=options.ram_budget,
        blocks_to_swap=options.blocks_to_swap,
        fused=not options.no_triton,
        measure=False,
    )
    if options.card is not None:
        limits = with_card(limits, _profile(options.card))
    made = model.make_plan(COMMANDS[family].planned_work(options, model), limits)
    print(describe_plan(made) if made.times_are_measured else f"{describe_plan(made)}\n{assumed_rates(limits)}")


def _profile(path: Path) -> CardProfile:
    if not path.is_file():
        raise ValueError(
            f"{path}: there is no such profile of a card; give one that `bench -o` wrote, such as those of "
            "benchmarks/cards"
        )
    return load_profile(path)


def inspect(options: argparse.Namespace) -> None:
    """Print what a checkpoint file is and what it needs beside it."""
    print(describe(identify(open_checkpoint(options.file))))


def convert_file(options: argparse.Namespace) -> None:
    """Write a quantised copy of a Wan or FramePack transformer, tensor by tensor."""
    checkpoint = family_of(options.source).open_file(options.source)
    others = parts_left_out(open_checkpoint(options.source), checkpoint)
    progress = TerminalProgress(sys.stderr)

    def begun(done: int, total: int) -> None:
        if not done:
            progress.begin("convert")
        progress.update(done, total)

    try:
        with OutputFile(options.target, options.target, overwrite=True) as output:  # `convert` refuses what is there
            path = convert(checkpoint, output.pick(), options.to, begun, use_device(options.device))
    finally:
        progress.end()
    print(f"{path}: {in_gib(path.stat().st_size)}")
    if others:
        print(f"left out, as the copy is of the transformer only: {others}; {options.source.name} still has them")


def demo(options: argparse.Namespace) -> None:
    """Make a few videos with the pack's own tiny model: one mp4 and a contact sheet beside it."""
    torch.set_num_threads(1)  # its tensors are so small that threads cost more than they give
    with OutputFile(options.output, Path("output/demo.mp4"), options.overwrite, beside=".png") as output:
        path = output.pick()
        print(make_demo(path, options.seed, use_device(options.device), TerminalProgress(sys.stderr)))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM interrupts what goes in here."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be set
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int = BAD_INPUT) -> int:
    print(f"lowvram-video: {printable(' '.join(message.split()))}", file=sys.stderr)
    return status
