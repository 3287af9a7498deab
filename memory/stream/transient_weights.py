"""Weights that are needed for a moment of each pass and live in host memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from .host_blocks import HostBlocks
from .layout import TensorSource, align, bind, layout_block, unbind, view_of
from .pinned import PinnedBudget


class Layer(Protocol):
    """A layer of the modules that can be had some rows at a time."""

    def pieces(self, *, stored: Mapping[str, Tensor]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Which rows, and views of what is `stored` of them by parameters' names; no piece larger than the first."""
        ...


class TransientWeights:
    """Brings modules to the device for the length of a `with` block, or linear layers some rows at a time.

    They lie in bytes that are spare at that moment. `modules` by their full names. The copies run on the stream that
    computes, so the bytes may be reused behind it without waiting; from pinned memory the host does not wait either.
    """

    def __init__(
        self, source: TensorSource, modules: Mapping[str, nn.Module], device: torch.device, budget: PinnedBudget | None
    ):
        self._device = device
        self._index = {id(module): index for index, module in enumerate(modules.values())}
        self._layers = {
            id(layer): (index, f"{name}." if name else "")
            for index, module in enumerate(modules.values())
            for name, layer in module.named_modules()
        }
        layouts = [layout_block(source, name, module.state_dict()) for name, module in modules.items()]
        self._host = HostBlocks(source, layouts, budget)

    @property
    def pinned_bytes(self) -> int:
        return self._host.pinned_bytes

    @property
    def host_bytes(self) -> int:
        return self._host.host_bytes

    @contextmanager
    def __call__(self, modules: Sequence[nn.Module], spare: Tensor | None) -> Iterator[None]:
        """`spare` is any contiguous device tensor whose bytes nobody needs; too small or None: memory is allocated."""
        indices = [self._index[id(module)] for module in modules]
        sizes = [align(self._host.layouts[index].nbytes) for index in indices]
        flat = self._room(sum(sizes), spare)
        try:
            for module, index, part in zip(modules, indices, flat[: sum(sizes)].split(sizes), strict=True):
                extent = self._host.extents[index]
                part[: extent.numel()].copy_(extent, non_blocking=True)
                bind(module, self._host.layouts[index], part)
            yield
        finally:
            for module, index in zip(modules, indices, strict=True):
                unbind(module, self._host.layouts[index])

    def pieces(self, layer: Layer, spare: Tensor | None) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """A layer of the modules some rows at a time, each piece over the last one's bytes.

        `spare` as above.
        """
        index, prefix = self._layers[id(layer)]
        extent, places = self._host.extents[index], self._host.layouts[index].places
        stored = {
            place.name.removeprefix(prefix): view_of(place, extent)
            for place in places
            if place.name.startswith(prefix) and "." not in place.name.removeprefix(prefix)
        }
        flat: Tensor | None = None
        for rows, piece in layer.pieces(stored=stored):
            sizes = [align(tensor.nbytes) for tensor in piece.values()]
            if flat is None:
                flat = self._room(sum(sizes), spare)
            parts = flat[: sum(sizes)].split(sizes)
            yield rows, {name: _copied(piece[name], part) for name, part in zip(piece, parts, strict=True)}

    def _room(self, nbytes: int, spare: Tensor | None) -> Tensor:
        flat = None if spare is None else spare.flatten().view(torch.uint8)
        if flat is None or flat.numel() < nbytes:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return flat

    def release(self) -> None:
        """Give the host memory back; calling it again does nothing."""
        self._host.release()


def _copied(tensor: Tensor, there: Tensor) -> Tensor:
    """A contiguous tensor of host memory in bytes of the device that are no fewer."""
    there = there[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return there.copy_(tensor, non_blocking=True)
