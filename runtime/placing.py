"""Modules on a device for as long as they work."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class on_device(Generic[M]):
    """A module on a device for the length of a `with` block, and back on the CPU afterwards."""

    def __init__(self, module: M, device: torch.device):
        self.module, self.device = module, device

    def __enter__(self) -> M:
        return self.module.to(self.device)

    def __exit__(self, *_: object) -> None:
        self.module.to("cpu")
