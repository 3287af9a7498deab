"""The regular expressions of tokenizer files, for Python's `re`.

They are written for Oniguruma: `\\p{L}` is any letter there, `\\s` is Unicode's White_Space. Both engines try the
alternatives in order and backtrack, so only the classes of characters need to be spelled out.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

# Unicode's White_Space; Python's own \s has the separators U+001C to U+001F too.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PLAIN_ESCAPES = frozenset("rnt|[](){}.*+?^$\\/-'\"<>")  # mean the same in both


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The pattern for `re`. ValueError for a construct that is not translated, such as `\\w` or `[[:alpha:]]`."""
    translated, position, in_class = [], 0, False
    for match in re.finditer(r"\\[pP]\{\w+\}|\\.|\[:|\[|\]|.", pattern, re.DOTALL):
        token = match[0]
        if match.start() != position or token == "[:" or (in_class and token == "["):
            raise _unknown(pattern, token)
        position = match.end()
        if token == "[" or token == "]":
            in_class = token == "["
        elif token[0] == "\\":
            token = _escape(pattern, token, in_class)
        translated.append(token)
    try:
        return re.compile("".join(translated))
    except re.error as error:
        raise ValueError(
            f"the split pattern {pattern!r} cannot be compiled ({error}); expected a regular one"
        ) from error


def _escape(pattern: str, token: str, in_class: bool) -> str:
    """A class of characters spelled out, in brackets of its own unless it stands in some already."""
    if token[1] in PLAIN_ESCAPES:
        return token
    if token in ("\\s", "\\S"):
        characters = WHITE_SPACE
    elif token[:3] in ("\\p{", "\\P{"):
        characters = category_ranges(token[3:-1])
    else:
        characters = ""
    negated = token[1] in "SP"
    if not characters or (negated and in_class):
        raise _unknown(pattern, token)
    return characters if in_class else f"[{'^' if negated else ''}{characters}]"


def _unknown(pattern: str, token: str) -> ValueError:
    return ValueError(
        f"the split pattern {pattern!r} has {token!r}, which is not known here; expected that of LLaMA 3 or CLIP"
    )


@cache
def category_ranges(category: str) -> str:
    """All characters whose Unicode category starts with `category` ("L", "N", "Lu"), as ranges for a bracket.

    They are those of this Python's Unicode: scripts added since then are no letters yet. Empty where none has it.
    """
    ranges: list[list[int]] = []
    for point in range(sys.maxunicode + 1):
        if not unicodedata.category(chr(point)).startswith(category):
            continue
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
