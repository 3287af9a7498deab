"""Whether files are still those that were opened: what streams from them would be other weights."""

from __future__ import annotations

from collections.abc import Iterable

from ...system.file_stamp import change_of
from .checkpoint import CheckpointError, TensorInfo


class FileStamps:
    """The files of tensors as they were when their headers were read; those of no known stamp are left out."""

    def __init__(self, infos: Iterable[TensorInfo]) -> None:
        self._stamps = {info.file: info.stamp for info in infos if info.stamp is not None}

    def check(self) -> None:
        """CheckpointError where a file was changed, replaced or deleted since."""
        for file, stamp in self._stamps.items():
            what = change_of(file, stamp)
            if what is not None:
                raise CheckpointError(
                    f"{file} was {what} while the model streams from it, and the video would be of two models: put "
                    "the file back and start again, and leave it alone meanwhile, or give enough RAM to hold the model"
                )
