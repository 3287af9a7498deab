"""Arguments that commands of both model families take: values, the machine's flags, whose flag is whose."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..attention.select import ATTENTION_MODES
from ..memory.plan.footprint import WorkSize
from ..memory.plan.parking import ParkSpec, parse_parking
from ..memory.report.report import RunReport
from ..runtime.cards import with_devices
from ..runtime.progress import Progress
from ..runtime.settings import CPU, DTYPES, RunSettings, use_device
from ..weights.linear.compute import QUANTIZATIONS
from ..weights.lora.attach import LORA_MODES
from ..weights.lora.file import LoraChoice
from .flags import flag, is_given
from .sparse import sparse_of
from .step_cache import step_cache_of

logger = logging.getLogger(__name__)


class OpenedModel(Protocol):
    """A model whose files are open, for any number of videos one after the other."""

    def release(self) -> None:
        """Give all memory back; what is made next reads the files again."""


@dataclass(frozen=True)
class FamilyCommands:
    """What the command line has of a model family: its own flags, making a video, the work and the model of `plan`.

    `foreign` are the options of other families, each with what holds instead for `models`. `source` is what a video is
    made with, files and settings, equal where one opened model can make both videos; `open_source` reads headers only;
    `check` refuses, before anything is loaded or begun, what `make` could not make. They raise ValueError.
    """

    models: str
    foreign: Mapping[str, str]
    add_generate: Callable[[argparse.ArgumentParser], None]
    add_plan: Callable[[argparse.ArgumentParser], None]
    source: Callable[[argparse.Namespace], Hashable]
    open_source: Callable[[Any, Progress], OpenedModel]
    check: Callable[[Any, argparse.Namespace], None]
    make: Callable[[Any, argparse.Namespace], RunReport]
    planned_work: Callable[[argparse.Namespace, Any], WorkSize]
    open_model: Callable[[argparse.Namespace, RunSettings], Any]

    def refuse_foreign(self, options: argparse.Namespace) -> None:
        """ValueError for a flag of another family."""
        for option, instead in self.foreign.items():
            if is_given(options, option):
                raise ValueError(f"{flag(option)} does not apply to {self.models}: {instead}")


@dataclass(frozen=True)
class WantedFile:
    """A file that a model needs beside it: the flag's name, and where to get it."""

    option: str
    title: str
    file_name: str
    source: str

    def required(self, options: argparse.Namespace, model: str) -> Path:
        """Its path. ValueError, which says what to download from where, if it was not given or is not there."""
        path: Path | None = getattr(options, self.option)
        get = f"download {self.file_name} from {self.source} at Hugging Face"
        if path is None:
            raise ValueError(f"{model} needs {flag(self.option)}, {self.title}: {get}")
        if not path.exists():
            advice = f"check the name and folder, or {get} for {self.title}"
            raise ValueError(f"{path}: no such file; expected a .safetensors model; {advice}")
        return path


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The flags that `settings_of` reads of every command, and `--report`."""
    machine = parser.add_argument_group("machine")
    add_device(machine)
    machine.add_argument(
        "--devices", metavar="LIST",
        help="cards that share each pass, such as cuda:0,cuda:1, or auto: all there are (in place of --device)",
    )  # fmt: skip
    machine.add_argument(
        "--park", type=parking, metavar="LIST",
        help="where streamed blocks lie, such as 'cuda:1,8gb;cpu,*': another card's memory, then RAM, then the disk",
    )  # fmt: skip
    machine.add_argument("--dtype", choices=list(DTYPES), default="auto", help="compute dtype")
    machine.add_argument(
        "--quantization", choices=list(QUANTIZATIONS), default="none",
        help="none: as stored; fp8, int8: quantise 16-bit files as they are read; fp8_fast: and multiply in fp8; "
        "4bit_fast: multiply 4-bit files as stored (comfy-kitchen); auto_fast: as stored, multiplied in fp8 where that "
        "is faster here",
    )  # fmt: skip
    machine.add_argument(
        "--lora-mode", choices=list(LORA_MODES), default="auto",
        help="auto: LoRAs run beside the weights where they can, else they are merged; side, merge: only one of these",
    )  # fmt: skip
    machine.add_argument(
        "--attention", choices=list(ATTENTION_MODES), default="auto",
        help="backend; auto: the fastest exact one here; auto_fast: also 8-bit ones (products: --quantization)",
    )  # fmt: skip
    machine.add_argument("--vram-budget", type=positive, metavar="GIB", help="hard limit (left out: what is free)")
    machine.add_argument("--ram-budget", type=positive, metavar="GIB", help="smaller than the model: stream from disk")
    machine.add_argument(
        "--blocks-to-swap", type=int, default=-1, metavar="N", help="-1: planned; else how many blocks stream"
    )
    machine.add_argument("--prefetch", type=block_count, metavar="N", help="blocks fetched ahead (left out: planned)")
    machine.add_argument("--no-pinned", action="store_true", help="stream from pageable memory")
    machine.add_argument("--report", type=Path, help="write what the run used as JSON, and a timeline PNG beside it")


def add_device(parser: argparse._ActionsContainer, default: str = "") -> None:
    """The flag that `use_device` reads; without a default it is the GPU where there is one."""
    parser.add_argument(
        "--device", default=default or ("cuda" if torch.cuda.is_available() else "cpu"), metavar="DEVICE",
        help="cuda, cuda:1 (the second GPU) or cpu (%(default)s)",
    )  # fmt: skip


def add_models(parser: argparse._ActionsContainer) -> None:
    """--models, of what measures a disk."""
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="of model files: how fast its disk is read")


def check_models(folder: Path | None) -> None:
    """ValueError where there is no such folder."""
    if folder is not None and not folder.exists():
        raise ValueError(f"{folder}: no such folder; expected the folder with your models, such as models/")


def add_size(parser: argparse._ActionsContainer) -> None:
    """--width and --height; left out, they are the model's own."""
    parser.add_argument("--width", type=int, metavar="PIXELS", help="of the video; a multiple of 16 or 32, by model")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="of the video")


def add_seed(parser: argparse._ActionsContainer) -> None:
    """--seed."""
    parser.add_argument("--seed", type=int, default=0, help="of the noise: the same seed makes the same video (0)")


def add_keeping(parser: argparse.ArgumentParser, kept: str) -> None:
    """The flags that `runs_folder` reads; `kept` is what the folder does, and which it is."""
    keeping = parser.add_argument_group("what is kept, so that a run that was stopped goes on")
    keeping.add_argument("--runs", type=Path, metavar="FOLDER", help=kept)
    keeping.add_argument("--no-resume", action="store_true", help="keep nothing, begin anew")


def runs_folder(options: argparse.Namespace, output: Path, name: str) -> Path | None:
    """Where runs are kept: `name` beside the output, or as given; None for `--no-resume`. ValueError for both."""
    if options.no_resume and options.runs is not None:
        raise ValueError("--runs and --no-resume exclude each other: runs are kept, or they are not; leave one out")
    if options.no_resume:
        return None
    runs: Path = options.runs or output.parent / name
    return runs


def settings_of(options: argparse.Namespace) -> RunSettings:
    """The machine's flags as settings."""
    settings = RunSettings(
        device=use_device(options.device) if options.devices is None else CPU,
        dtype=DTYPES[options.dtype],
        attention_mode=options.attention,
        quantization=options.quantization,
        lora_mode=options.lora_mode,
        vram_budget_gib=options.vram_budget,
        ram_budget_gib=options.ram_budget,
        blocks_to_swap=options.blocks_to_swap,
        prefetch=options.prefetch,
        pinned_memory=not options.no_pinned,
        batched_guidance=getattr(options, "batch_cfg", False),
        sparse=sparse_of(options),
        step_cache=step_cache_of(options),
        parking=options.park,
    )
    settings = settings if options.devices is None else with_devices(settings, options.devices)
    if options.vram_budget is not None and settings.device.type == "cpu":
        logger.warning("--vram-budget is not heeded on a processor, whose memory is RAM: --ram-budget limits that")
    return settings


# --- values ----------------------------------------------------------------------------------------------


def parking(text: str) -> ParkSpec:
    try:
        return parse_parking(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "above 0")


def not_negative(text: str) -> float:
    """A finite number from 0 up."""
    return _number(text, lambda value: 0 <= value < math.inf, "from 0 up")


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, lambda value: 0 <= value <= 1, "from 0 to 1")


def block_count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of blocks from 1 up: one arrives while another computes"
        )
    return int(text)


def lora_choice(text: str) -> LoraChoice:
    """`FILE:STRENGTH`, or a file alone at strength 1."""
    path, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:
        return LoraChoice(Path(text))  # no strength, though Windows paths have colons
    if not path or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no LoRA file and strength such as style.safetensors:0.8")
    return LoraChoice(Path(path), value)


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1000,750,500,250") from None


def _number(text: str, is_allowed: Callable[[float], bool], allowed: str) -> float:
    with suppress(ValueError):
        if is_allowed(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number {allowed}")
