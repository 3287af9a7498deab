"""`lowvram-video generate`: a video of whichever family the model's file is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ..families.table import FAMILIES, family_of_kind
from ..framepack.family import FRAMEPACK
from ..runtime.family import Family
from ..sampling.samplers import SAMPLERS
from ..wanvideo.family import WAN
from ..weights.files.kinds import file_kind
from ..weights.files.open import open_checkpoint
from .arguments import FamilyCommands, add_keeping, add_machine, add_seed, add_size, lora_choice
from .framepack import FRAMEPACK_COMMANDS
from .nag import add_nag
from .output import add_overwrite
from .progress import TerminalProgress
from .report import show_report
from .settings_tag import add_metadata
from .sparse import add_sparse
from .step_cache import add_step_cache
from .wan import WAN_COMMANDS

COMMANDS: Mapping[Family, FamilyCommands] = MappingProxyType({WAN: WAN_COMMANDS, FRAMEPACK: FRAMEPACK_COMMANDS})


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Flags of both model families; which of them a model takes is known when its file is (`generate`)."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", type=Path, required=True,
        help="Wan transformer (Wan 2.2 A14B: the high-noise one) or FramePack transformer",
    )  # fmt: skip
    files.add_argument(
        "--lora", type=lora_choice, action="append", default=[], metavar="FILE:STRENGTH",
        help="a LoRA for the model (strength left out: 1); may be given several times",
    )  # fmt: skip
    files.add_argument("--text-encoder", type=Path, help="umt5-xxl for Wan, llava_llama3 for FramePack")
    files.add_argument("--vae", type=Path, help="Wan 2.1 VAE, Wan 2.2 VAE for TI2V 5B, HunyuanVideo VAE for FramePack")
    files.add_argument(
        "--clip-vision", type=Path,
        help="reads pictures: clip_vision_h for Wan 2.1 I2V and FLF2V, sigclip_vision for FramePack",
    )  # fmt: skip
    files.add_argument("-o", "--output", type=Path, help="(output/video.mp4, numbered where that is there)")
    what = parser.add_argument_group("what to make (left out: the model's published setting)")
    what.add_argument(
        "--prompt", required=True, metavar="TEXT",
        help="what the video shows; FramePack: also [2s: what it shows from then on]",
    )  # fmt: skip
    what.add_argument(
        "--negative-prompt", metavar="TEXT", help="what it shall not show, where there is guidance or --nag"
    )
    what.add_argument("--image", type=Path, help="first frame (Wan I2V, FLF2V, TI2V, VACE and Fun, FramePack)")
    what.add_argument("--end-image", type=Path, help="last frame (Wan I2V, FLF2V and VACE, FramePack)")
    add_size(what)
    add_seed(what)
    how = parser.add_argument_group("sampling")
    how.add_argument("--steps", type=int, help="from noise to video; distilled models and LoRAs take 4 to 8")
    how.add_argument("--sampler", choices=list(SAMPLERS), help="solver (unipc; FramePack: unipc_bh1)")
    how.add_argument("--shift", type=float, help="above 1: more of the steps at high noise (0: FramePack's own)")
    add_nag(how)
    for commands in COMMANDS.values():
        commands.add_generate(parser)
    add_keeping(
        parser,
        "keeps Wan's steps until the video is whole, FramePack's sections for good (wan or framepack, beside --output)",
    )
    add_machine(parser)
    add_sparse(parser)
    add_step_cache(parser)
    add_overwrite(files)
    add_metadata(files)
    parser.set_defaults(command=generate)


def generate(options: argparse.Namespace) -> None:
    """Make a video with the model that the file holds."""
    commands = commands_of(options)
    opened = commands.open_source(commands.source(options), TerminalProgress(sys.stderr))
    show_report(commands.make(opened, options), options)


def commands_of(options: argparse.Namespace) -> FamilyCommands:
    """Those of the model's family. ValueError for flags of another one, and for what is no model."""
    commands = COMMANDS[family_of_file(options.model)]
    commands.refuse_foreign(options)
    return commands


def family_of_file(path: Path) -> Family:
    """That of a file; the first family's loader says what any other file is."""
    return family_of_kind(file_kind(open_checkpoint(path).tensors).kind) or FAMILIES[0]
