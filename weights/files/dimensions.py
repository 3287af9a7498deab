"""Dimensions of a model from the names and shapes of a checkpoint's tensors; what does not tell is named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .checkpoint import Checkpoint, CheckpointError

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "")


def model_prefix(names: Iterable[str], roots: tuple[str, ...]) -> str | None:
    """What stands before a transformer's names in a file; None where no name fits.

    `roots` are the first parts of its names, which tell a prefix from a chance match.
    """
    names = list(names)

    def num_rooted(prefix: str) -> int:
        starts = tuple(prefix + root for root in roots)
        return sum(name.startswith(starts) for name in names)

    prefix = max(PREFIXES, key=num_rooted)
    return prefix if num_rooted(prefix) else None


@dataclass(frozen=True)
class Dimensions:
    """The shapes of a checkpoint under a model's own names; `title` is the model with its article, for messages."""

    checkpoint: Checkpoint
    title: str

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """A tensor's shape, unpacked; CheckpointError where it lacks or has another number of dimensions."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.checkpoint.path}: {self.title} without {name}; expected that tensor to tell its size; "
                "the file is incomplete: download it again"
            )
        shape = info.logical_shape or info.shape
        if len(shape) != num_dims:
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} has shape {list(shape)}; expected {num_dims} dimensions; "
                f"it is not {self.title}'s: choose another file"
            )
        return shape

    def num_blocks(self, stem: str) -> int:
        """How many numbers follow `stem` at the start of names; CheckpointError for none, or a gap between them."""
        pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
        blocks = {int(match[1]) for name in self.checkpoint.tensors if (match := pattern.match(name))}
        if not blocks:
            raise CheckpointError(
                f"{self.checkpoint.path}: {self.title} without {stem}.0; expected at least that block; "
                "the file is incomplete: download it again"
            )
        absent = next(number for number in range(len(blocks) + 1) if number not in blocks)
        if absent < len(blocks):
            raise CheckpointError(
                f"{self.checkpoint.path}: block {absent} is missing ({stem}.{absent}), though there are {len(blocks)} "
                f"blocks up to {max(blocks)}; expected them numbered from 0; the file is incomplete: download it again"
            )
        return len(blocks)
