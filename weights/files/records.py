"""Small safetensors files of this program's own: read whole, once the header says that they are what they seem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...system.regular_files import read_regular
from .safetensors import open_single


def read_record(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """A file's tensors and texts. ValueError where it is damaged, OSError as the system's.

    It may have grown to anything meanwhile: nothing is read by its length that its header does not say.
    """
    checkpoint = open_single(path)
    size = max((info.offset + info.nbytes for info in checkpoint.tensors.values()), default=0)
    try:
        # not mapped: Windows would not let the file be replaced
        return load(read_regular(path, max(size, 1 << 16))), checkpoint.metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
