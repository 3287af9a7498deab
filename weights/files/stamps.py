"""Whether files are still those that were opened: what streams from them would be other weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .checkpoint import CheckpointError

Stamp = tuple[int, int]  # size, time of change in nanoseconds


class FileStamps:
    """Sizes and times of files as they are now; those that are not there yet are left out."""

    def __init__(self, files: Iterable[Path]) -> None:
        found = {file: stamp_of(file) for file in set(files)}
        self._stamps = {file: stamp for file, stamp in found.items() if stamp is not None}

    def check(self) -> None:
        """CheckpointError where a file was changed, replaced or deleted since."""
        for file, stamp in self._stamps.items():
            now = stamp_of(file)
            if now != stamp:
                what = "deleted" if now is None else "changed"
                raise CheckpointError(
                    f"{file} was {what} while the model streams from it, and the video would be of two models: put "
                    "the file back and start again, and leave it alone meanwhile, or give enough RAM to hold the model"
                )


def stamp_of(file: Path) -> Stamp | None:
    """Size and time of change of a file; None where it is not there."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
