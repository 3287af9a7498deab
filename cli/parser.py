"""The parser of all commands: a mistake is one line, with the command whose help has the rest."""

from __future__ import annotations

import argparse
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
