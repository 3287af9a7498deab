"""The flags of negative guidance (NAG), which both model families hear."""

from __future__ import annotations

import argparse

from ..transformer.nag import NagSettings


def add_nag(group: argparse._ArgumentGroup) -> None:
    """The flags that `nag_settings` reads."""
    group.add_argument(
        "--nag", type=float, metavar="SCALE",
        help="the negative prompt counts without a second pass too, in attention; 5 to 11 are usual",
    )  # fmt: skip
    group.add_argument("--nag-tau", type=float, help="how many times as long a token's result may become; 2.5")
    group.add_argument("--nag-alpha", type=float, help="how much of the guided result is mixed in; 0.25")


def nag_settings(options: argparse.Namespace) -> NagSettings | None:
    """The settings of --nag; None where it is off. ValueError for those that are no use."""
    given = {"scale": options.nag, "tau": options.nag_tau, "alpha": options.nag_alpha}
    if options.nag is None:
        if options.nag_tau is not None or options.nag_alpha is not None:
            raise ValueError("--nag-tau and --nag-alpha are settings of --nag: give --nag SCALE too, such as --nag 5")
        return None
    settings = NagSettings(**{name: value for name, value in given.items() if value is not None})
    settings.check()
    return settings if settings.is_on else None
