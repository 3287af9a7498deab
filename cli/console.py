"""The terminal as the commands write to it: any text can be written, and none of it does anything there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from ..system.plain_text import printable_lines


class PlainStream:
    """A stream that writes names of files and the like without what a terminal would obey.

    What its encoding lacks (Windows' code pages have few characters) becomes an escape, such as \\u65e5: it never
    decides whether a run succeeds.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        plain = printable_lines(text)
        self._stream.write(plain.encode(encoding, "backslashreplace").decode(encoding, "replace"))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # flush, isatty, encoding, fileno ...
        return getattr(self._stream, name)


@contextmanager
def plain_console() -> Iterator[None]:
    """Have stdout and stderr be such streams meanwhile, where there are any."""
    out, err = (stream and cast(TextIO, PlainStream(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield
