"""What flags are called, and which of them were given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def flag(option: str) -> str:
    """The flag of an option: `one_frame` is `--one-frame`."""
    return f"--{option.replace('_', '-')}"


def is_given(options: argparse.Namespace, option: str) -> bool:
    """Whether a flag without a default was given."""
    value = getattr(options, option, None)
    return not (value is None or value is False or value == [])


def has(options: argparse.Namespace, option: str, details: Sequence[str], such_as: str) -> bool:
    """Whether an option that `details` are of is given. ValueError where one of these is, and it is not."""
    if getattr(options, option, None) is not None:
        return True
    for detail in details:
        if getattr(options, detail, None) is not None:
            raise ValueError(
                f"{flag(detail)} says nothing without {flag(option)}: give that too, such as {flag(option)} {such_as}"
            )
    return False
