"""Whether files are still those that were opened: what streams from them would be other weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...system.file_stamp import stamp_of
from .checkpoint import CheckpointError


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
