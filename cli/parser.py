"""The parser of all commands: a mistake is one line, with the command whose help has the rest."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

BAD_INPUT = 2


class CommandParser(argparse.ArgumentParser):
    """argparse's, without a page of usage above what is wrong; what `add_subparsers` makes is one too.

    Flags are written out: an abbreviation may be another flag's tomorrow.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__(**values, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; {self.prog} --help shows what there is\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """What `parse_args` and commands are read by: here, where the command is known, what it has not is refused."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown
