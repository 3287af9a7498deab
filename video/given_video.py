"""A video file that somebody gave, which must stay as it is for as long as it is read, however often."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from ..system.file_stamp import change_of, stamp_of

T = TypeVar("T")


class GivenVideo:
    """The file at `path` as it is now; what is read of it is told from what it is changed to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = stamp_of(path)

    def check(self) -> None:
        """ValueError where it was changed, replaced or deleted since: frames that were read may be of two videos."""
        what = change_of(self.path, self._stamp)
        if what is not None:
            raise ValueError(
                f"{self.path} was {what} while it was read, and the new video would be of two: put the file back and "
                "start again, and leave it alone meanwhile"
            )

    def checked(self, pieces: Generator[T, None, None]) -> Generator[T, None, None]:
        """What is read of it, piece by piece; ValueError as `check` before one that may be of another file.

        Where the reading itself fails, the file that was changed is why.
        """
        with closing(pieces):
            try:
                for piece in pieces:
                    self.check()
                    yield piece
            except ValueError:
                self.check()
                raise
        self.check()
