"""Normalised attention guidance: attention to a negative prompt, pushed away from in the space of attention's result.

Chen et al. 2025 (arXiv:2505.21179). It steers models that were distilled to do without classifier-free guidance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NagSettings:
    """How far (`scale`, 1: not at all), how much longer at most (`tau`), and how much of it (`alpha`, 0: none)."""

    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25

    def check(self) -> None:
        """ValueError for values that are no use."""
        for name, value, most in (("scale", self.scale, 100.0), ("tau", self.tau, 100.0), ("alpha", self.alpha, 1.0)):
            if not (math.isfinite(value) and 0.0 <= value <= most):
                raise ValueError(f"nag_{name} is {value}: use a number from 0 to {most:g}")

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self.alpha != 0.0 and self.scale != 1.0


def guide_(positive: Tensor, negative: Tensor, settings: NagSettings, chunks: Iterable[slice]) -> None:
    """Guide `positive [rows, dim]` in place, some rows at a time; `negative` is used up.

    A row becomes alpha g + (1 - alpha) p, where g = scale p - (scale - 1) n is scaled down to the L1 norm tau |p| where
    it is longer.
    """
    for rows in chunks:
        kept, guided = positive[rows], negative[rows]
        norm = torch.linalg.vector_norm(kept, ord=1, dim=-1, keepdim=True, dtype=torch.float32)
        guided.lerp_(kept, settings.scale)
        length = torch.linalg.vector_norm(guided, ord=1, dim=-1, keepdim=True, dtype=torch.float32)
        ratio = (length / norm).nan_to_num(nan=10.0)
        factor = torch.where(ratio > settings.tau, norm * settings.tau / (length + 1e-7), 1.0)
        kept.mul_(1.0 - settings.alpha).addcmul_(guided, settings.alpha * factor)
