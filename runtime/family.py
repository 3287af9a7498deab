"""What the command line and the nodes know of a family of models: one entry of the table in families/."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..weights.files.checkpoint import Checkpoint, TensorInfo
from ..weights.files.kinds import WantedKind
from .streamed import StreamedModel


@dataclass(frozen=True)
class Description:
    """A file in words: variant and size, its dimensions, and the other files that it works with."""

    title: str
    dimensions: str = ""
    companions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How a family's transformer files are recognised, opened and described.

    `wanted` is the kind of file. `open_file` gives the checkpoint with the model's own names, `open_model` the model
    ready to be planned and started (LoRA names and footprint are its); both read headers only and raise CheckpointError
    for what they cannot open. `check` is all that they ask of an opened file. `with_own_names` only names a file's
    tensors as the model does; `describe` takes what comes of it, and says what it lacks or why it is not supported
    where it cannot be opened.
    """

    name: str
    wanted: WantedKind
    open_file: Callable[[Path], Checkpoint]
    open_model: Callable[..., StreamedModel[Any]]
    with_own_names: Callable[[Checkpoint], Checkpoint]
    describe: Callable[[Checkpoint], Description]
    check: Callable[[Checkpoint], object]


def num_parameters(tensors: Iterable[TensorInfo]) -> str:
    """How many numbers a model has, as people say it: "14.3B"."""
    num = sum(math.prod(info.unpacked_shape) for info in tensors)
    return f"{num / 1e9:.1f}B" if num >= 1e9 else f"{num / 1e6:.1f}M"
