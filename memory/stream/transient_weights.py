"""Weights that are needed for a moment of each pass and live in host memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .host_blocks import HostBlocks
from .layout import TensorSource, align, bind, layout_block, unbind
from .pinned import PinnedBudget


class TransientWeights:
    """Brings modules to the device for the length of a `with` block, into bytes that are spare at that moment.

    `modules` by their full names. The copies run on the stream that computes, so the bytes may be reused behind it
    without waiting; from pinned memory the host does not wait either.
    """

    def __init__(
        self, source: TensorSource, modules: Mapping[str, nn.Module], device: torch.device, budget: PinnedBudget | None
    ):
        self._device = device
        self._index = {id(module): index for index, module in enumerate(modules.values())}
        layouts = [layout_block(source, name, module.state_dict()) for name, module in modules.items()]
        self._host = HostBlocks(source, layouts, budget)

    @property
    def pinned_bytes(self) -> int:
        return self._host.pinned_bytes

    @contextmanager
    def __call__(self, modules: Sequence[nn.Module], spare: Tensor | None) -> Iterator[None]:
        """`spare` is any contiguous device tensor whose bytes nobody needs; too small or None: memory is allocated."""
        indices = [self._index[id(module)] for module in modules]
        sizes = [align(self._host.layouts[index].nbytes) for index in indices]
        flat = None if spare is None else spare.flatten().view(torch.uint8)
        if flat is None or flat.numel() < sum(sizes):
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        try:
            for module, index, part in zip(modules, indices, flat[: sum(sizes)].split(sizes), strict=True):
                extent = self._host.extents[index]
                part[: extent.numel()].copy_(extent, non_blocking=True)
                bind(module, self._host.layouts[index], part)
            yield
        finally:
            for module, index in zip(modules, indices, strict=True):
                unbind(module, self._host.layouts[index])

    def release(self) -> None:
        """Give the host memory back; calling it again does nothing."""
        self._host.release()
