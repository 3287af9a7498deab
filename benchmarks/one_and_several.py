"""The command line of benchmarks that set one card against several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from lowvram_video.runtime.cards import parse_devices
from surviving import CHILD


def make_parser(description: str | None, limit_seconds: float, separators: str) -> argparse.ArgumentParser:
    """Which cards and rows, and how long a row may take; a child is told of itself."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--rows", help=f"names with {separators} between them (left out: all)")
    parser.add_argument("--twice", action="store_true", help="one GPU stands for two")
    parser.add_argument("--tiny", action="store_true", help="two CPU cards, tiny sizes")
    parser.add_argument("--limit", type=float, default=limit_seconds, help="seconds of a row")
    parser.add_argument("--out", type=Path)
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    return parser


def cards_of(options: argparse.Namespace) -> Sequence[torch.device]:
    """The cards that such options ask for."""
    if options.tiny or options.twice:
        return (torch.device("cpu") if options.tiny else torch.device("cuda", 0),) * 2
    return parse_devices(options.devices)
