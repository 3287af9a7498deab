"""Text of others, such as names in files, for terminals, logs and messages: none of it does anything there."""

from __future__ import annotations

import re

# What terminals obey (C0, DEL, C1), what ends a line elsewhere, what turns the direction of writing around or hides
# (bidirectional marks, joiners of tags), half characters, and U+FEFF.
_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
LONGEST = 300


def printable(text: object) -> str:
    """A text in one line with escapes, such as \\x1b, for all that a terminal would obey or not show."""
    return _ACTIVE.sub(_escape, str(text))


def printable_lines(text: str) -> str:
    """The same, with its line breaks, tabs and returns to the start of a line: for a program's own layout."""
    return _ACTIVE.sub(lambda match: match[0] if match[0] in "\n\t\r" else _escape(match), text)


def short(text: str, longest: int = LONGEST) -> str:
    """`printable`, cut where it is long."""
    text = printable(text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def shown(value: object, longest: int = LONGEST) -> str:
    """A value of a file for a message: its `repr` without what terminals obey, cut where it is long."""
    return short(repr(value[: longest + 1] if isinstance(value, str | bytes | list | tuple) else value), longest)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
