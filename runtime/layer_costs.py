"""What the layers of a model cost beside their weights, for the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from ..memory.stream.layout import BlockLayout, Part
from ..transformer.transformer import Block, Transformer
from ..weights.linear.linear import Linear
from ..weights.linear.weight_format import PLAIN
from .host_weights import WeightParts


class LayerCosts:
    """The linear layers of a model on the meta device, as their formats are by now; see `ModelFootprint` for the words.

    `dtype` is what is computed in.
    """

    def __init__(self, model: Transformer, blocks: Sequence[Block], parts: WeightParts):
        self._model, self._blocks, self._parts = model, blocks, parts

    @property
    def busy_modules(self) -> list[nn.Module]:
        """Those whose layers see all tokens."""
        return [module for block in self._blocks for module in block.busy_modules()]

    @property
    def busy_layers(self) -> list[Linear]:
        return [layer for module in self.busy_modules for layer in module.modules() if isinstance(layer, Linear)]

    @property
    def form(self) -> str:
        """The name of the format that most of the blocks' weights have: a card's measurements are by it."""
        sizes: Counter[str] = Counter()
        for layer in self.busy_layers:
            sizes[layer.format.name] += layer.in_features * layer.out_features
        return max(sizes, key=lambda name: sizes[name], default=PLAIN.name)

    def row_bytes(self, dtype: torch.dtype, compiled_columns: int = 0) -> int:
        """Compiled code makes products, of so many columns at most, in a tensor of their own and copies them."""
        copied = compiled_columns * dtype.itemsize
        return copied + max((layer.row_bytes(dtype) for layer in self.busy_layers), default=0)

    def key_row_bytes(self, dtype: torch.dtype, dim: int) -> int:
        """Of layers that read tokens of `dim`."""
        from_rows = (layer for layer in self.busy_layers if layer.in_features == dim)
        return max((layer.row_bytes(dtype) for layer in from_rows), default=0)

    @property
    def copies_rows(self) -> bool:
        """Whether all products may be written over the rows that they read."""
        return all(layer.copies_rows for layer in self.busy_layers)

    @property
    def takes_late_rows(self) -> bool:
        """Whether no layer needs what is normed for it as it is."""
        return all(layer.format.takes_late_rows for layer in self.busy_layers)

    @property
    def product_bytes(self) -> int:
        return max((layer.format.product_bytes for layer in self.busy_layers), default=0)

    def unpacked_bytes(self, dtype: torch.dtype) -> int:
        """Layers that are brought are unpacked some rows at a time."""
        inside = {layer for block in self._blocks for layer in block.modules()}
        brought = self._brought_layers
        outside = (layer for layer in self._model.modules() if isinstance(layer, Linear) and layer not in inside)
        return max(
            (layer.piece_bytes(dtype)[1] if layer in brought else layer.unpacked_bytes(dtype) for layer in outside),
            default=0,
        )

    def brought_bytes(self, dtype: torch.dtype) -> int:
        return max((layer.piece_bytes(dtype)[0] for layer in self._brought_layers), default=0)

    def stage_bytes(self, layouts: Sequence[BlockLayout]) -> tuple[tuple[int, ...], ...]:
        """Of blocks that are laid out so."""
        part = Part.STREAM if self._parts.per_run else Part.ALL
        return tuple(tuple(stop - start for start, stop in layout.spans(part, True)) for layout in layouts)

    @property
    def _brought_layers(self) -> set[Linear]:
        """Layers outside the blocks that are brought some rows at a time where memory is short."""
        modules = (getattr(self._model, name) for name in self._parts.in_pieces)
        return {layer for module in modules for layer in module.modules() if isinstance(layer, Linear)}
