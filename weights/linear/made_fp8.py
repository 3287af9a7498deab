"""Weights of any stored form, multiplied in fp8: unpacked some rows at a time and rounded to fp8 with a scale per row.

Beside one read of the stored bytes that is 5 bytes of traffic for an element (2 + 2 + 1; dense weights have 2), most of
them in the cache, against a product that takes half as long. Wan 14B's 14 billion elements: 18 ms on an H200 (4 TB/s),
of 500 ms that fp8 products save at 832x480x81.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .fp8 import Fp8Matmul, RowsProjection
from .projection import Projection, Scratch
from .weight_format import WeightFormat

PIECE_ELEMENTS = 1 << 24  # unpacked at a time, 32 MiB in 16 bits: a GPU's cache holds much of it


@dataclass(frozen=True)
class Fp8Made(WeightFormat):
    """A weight of the form `stored`; its error is that form's and that of fp8 (about 2.6 % of a weight) together."""

    stored: WeightFormat
    product: Fp8Matmul

    is_dense = False
    copies_rows = True

    @property
    def name(self) -> str:
        return f"{self.stored.name}, multiplied in fp8"

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        return self.stored.unpack(packed, out)

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        return self.stored.logical_shape(weight)

    def suits(self, packed: Mapping[str, Tensor]) -> bool:
        """Whether the product takes a layer's weight."""
        return all(size % self.product.multiple == 0 for size in self.logical_shape(packed["weight"]))

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        shape = self.logical_shape(packed["weight"])
        device = packed["weight"].device
        scratch = scratch or Scratch(device, dtype)
        made, columns = scratch.take((math.prod(shape) // dtype.itemsize,)), torch.empty(shape[0], device=device)
        weight = made.view(torch.float8_e4m3fn).view(shape)
        piece = scratch.take((self._rows_at_once(shape), shape[1]))
        for rows, part in self.stored.pieces(packed, self._rows_at_once(shape)):
            unpacked = self.stored.unpack(part, piece[: rows.stop - rows.start])
            _, scales = self.product.ops.quantize(unpacked, torch.float8_e4m3fn, weight[rows])
            columns[rows] = scales.view(-1)
        scratch.give_back(piece)
        return RowsProjection(weight, columns, bias, self.product)

    @property
    def takes_late_rows(self) -> bool:
        return self.product.takes_late_rows

    def row_bytes(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        shape = self.logical_shape(packed["weight"])
        return self.product.row_bytes({"weight": packed["weight"].new_empty(shape, device="meta")}, dtype)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        shape = self.logical_shape(packed["weight"])
        return math.prod(shape) // dtype.itemsize + self._rows_at_once(shape) * shape[1]

    def _rows_at_once(self, shape: tuple[int, ...]) -> int:
        return min(shape[0], max(1, PIECE_ELEMENTS // shape[1])) if self.stored.splits else shape[0]
