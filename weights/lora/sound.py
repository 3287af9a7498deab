"""A LoRA's numbers, which must be numbers: NaN in one of them makes a black video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..files.checkpoint import Checkpoint, CheckpointError

MOST_STRENGTH = 100.0  # as ComfyUI's nodes allow
MOST_SCALE = 1e6  # of alpha / rank; published ones are around 1


def check_strengths(strengths: Sequence[float], names: Sequence[object]) -> None:
    """ValueError, by the LoRA's name, for a strength that makes no picture."""
    for strength, name in zip(strengths, names, strict=True):
        if not abs(strength) <= MOST_STRENGTH:
            raise ValueError(
                f"{name}: its strength is {strength:g}: use a number from -{MOST_STRENGTH:g} to {MOST_STRENGTH:g} "
                "(1 is as it was trained)"
            )


def check_scale(scale: float, checkpoint: Checkpoint, alpha: str) -> float:
    """alpha / rank of a file, as it is. CheckpointError, by what says the alpha, where it makes no picture."""
    if not abs(scale) <= MOST_SCALE:
        raise CheckpointError(
            f"{checkpoint.path}: {alpha} makes it {scale:.3g} times as strong as its tensors; expected about 1: "
            "download the LoRA again, or leave it out"
        )
    return scale


def read_sound(checkpoint: Checkpoint, key: str) -> Tensor:
    """A tensor as stored. CheckpointError where some of it is NaN or infinite, or it cannot be read."""
    tensor = checkpoint.read(key)
    if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
        raise CheckpointError(
            f"{checkpoint.path}: {key} has values that are no numbers (NaN or infinite), which would make a black "
            "video: download the LoRA again, or leave it out"
        )
    return tensor
