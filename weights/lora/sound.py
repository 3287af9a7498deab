"""A LoRA's numbers, which must be numbers: NaN in one of them makes a black video."""

from __future__ import annotations

from torch import Tensor

from ..files.checkpoint import Checkpoint, CheckpointError


def read_sound(checkpoint: Checkpoint, key: str) -> Tensor:
    """A tensor as stored. CheckpointError where some of it is NaN or infinite, or it cannot be read."""
    tensor = checkpoint.read(key)
    if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
        raise CheckpointError(
            f"{checkpoint.path}: {key} has values that are no numbers (NaN or infinite), which would make a black "
            "video: download the LoRA again, or leave it out"
        )
    return tensor
