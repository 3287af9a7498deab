"""The sound of a video file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_CHANNELS = 8


@dataclass(frozen=True)
class Sound:
    """`samples` [channels, T] in -1 ... 1, so many a second as `rate` says.

    ValueError for what is no sound.
    """

    samples: Tensor
    rate: int

    def __post_init__(self) -> None:
        shape = list(self.samples.shape)
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_CHANNELS or not self.samples.is_floating_point():
            raise ValueError(
                f"the sound is {self.samples.dtype} {shape}; expected [channels, samples], floats of 1 to "
                f"{MAX_CHANNELS} channels"
            )
        if self.rate < 1:
            raise ValueError(f"the sound has {self.rate} samples a second; expected at least 1, usually 44100")

    def first(self, seconds: float) -> Sound:
        """The beginning of it, or all where it is shorter."""
        return Sound(self.samples[:, : math.ceil(seconds * self.rate)], self.rate)

    def write(self, path: Path) -> list[str]:
        """Have `path` hold the samples; returns ffmpeg's options that read them. OSError as the system's."""
        samples = torch.nan_to_num(self.samples.detach().cpu().float())
        path.write_bytes(samples.t().contiguous().numpy().tobytes())
        return ["-f", "f32le", "-ar", str(self.rate), "-ac", str(self.samples.shape[0]), "-i", str(path)]
