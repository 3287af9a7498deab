"""What a video of the command line says of how it was made, in its own file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..video.tags import Tags
from ..weights.lora.file import LoraChoice
from .output import ABOUT_NO_RUN

CHOICES = ("settings", "prompt", "none")
WORDS = ("prompt", "negative_prompt")
UNSAID = (*ABOUT_NO_RUN, "output", "runs", "no_resume")  # where files lie, and what is told of them


def add_metadata(parser: argparse._ActionsContainer) -> None:
    """The flag that `settings_tags` reads."""
    parser.add_argument(
        "--metadata", choices=CHOICES, default="settings",
        help="what the video's comment tag says: the settings, with names of files and without prompts (default); "
        "prompt: prompts too; none: nothing",
    )  # fmt: skip


def settings_tags(options: argparse.Namespace) -> Tags:
    """A `comment` of the options that were given, as JSON; files by their names alone, prompts only where asked for."""
    if options.metadata == "none":
        return {}
    unsaid = UNSAID if options.metadata == "prompt" else (*UNSAID, *WORDS)
    given = {name: value for name, value in vars(options).items() if name not in unsaid}
    # a seed of 0 is a setting, which `== False` would take for none
    told = {name: _told(value) for name, value in given.items() if not (value is None or value is False or value == [])}
    return {"comment": json.dumps({"program": "lowvram-video", **told})}


def _told(value: object) -> object:
    if isinstance(value, LoraChoice):
        return f"{value.path.name}:{value.strength:g}"
    if isinstance(value, Path):
        return value.name
    if isinstance(value, (list, tuple)):
        return [_told(each) for each in value]
    return value if isinstance(value, (bool, int, float)) else str(value)
