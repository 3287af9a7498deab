"""`lowvram-video bench`: the user's card in five minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..card.bench import Bench, BenchSettings
from ..card.table import describe_card
from ..runtime.settings import use_device
from ..system.atomic_files import write_file
from ..system.card_profile import CardProfile, ProfileError, load_profile, save_profile
from .arguments import add_device, add_models, check_models
from .output import check_replaced
from .progress import TerminalProgress


def add_bench(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench`."""
    parser.add_argument("--quick", action="store_true", help="a minute: the widest layers and few lengths only")
    add_models(parser)
    add_device(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="write the JSON there too, and a PNG beside it; plans find what is kept of this card without it",
    )  # fmt: skip
    parser.set_defaults(command=bench)


def bench(options: argparse.Namespace) -> None:
    """Measure the card, show the table and keep it for plans; after Ctrl-C what there is is shown, and not kept."""
    output: Path | None = options.output
    if output is not None:
        check_replaced(output, "profile", _is_profile, picture="picture")
    check_models(options.models)
    progress = TerminalProgress(sys.stderr)
    measured = Bench(BenchSettings(use_device(options.device), options.quick, options.models), progress)
    try:
        measured.run()
    except KeyboardInterrupt:
        progress.end()
        _show(measured.profile, output)
        raise KeyboardInterrupt("interrupted: what was measured is shown, and not kept for plans") from None
    _show(measured.profile, output)
    print(f"\nkept for plans on this card: {save_profile(measured.profile)}")


def _is_profile(path: Path) -> bool:
    try:
        load_profile(path)
    except (OSError, ProfileError):
        return False
    return True


def _show(profile: CardProfile, output: Path | None) -> None:
    print(describe_card(profile))
    if output is not None:
        picture = output.with_suffix(".png")
        write_file(output, profile.to_json())
        from ..card.picture import draw_card  # matplotlib: without it all commands start sooner

        write_file(picture, draw_card(profile))
        print(f"\n{output}, {picture}: to share with others, add the JSON to benchmarks/cards in a pull request")
