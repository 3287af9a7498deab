"""One card's part of a cache that several cards share."""

from __future__ import annotations

import torch
from torch import Tensor

from .residual import MakeRoom, Residual


class FollowedCache(Residual):
    """A `BlockCache` of one card's rows, of several; whether to add its residual is asked of the first card's cache."""

    def __init__(self, probes: bool = False, make_room: MakeRoom = torch.empty) -> None:
        super().__init__(make_room)
        self.probes = probes

    def reuse(self, signal: Tensor) -> bool:
        raise AssertionError("asked of the first card's cache")
