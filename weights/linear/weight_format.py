"""How a weight is stored and multiplied: what formats have in common, and the plain one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.row_reference import RowOps
from ..kernels.rows import dequantize_rows
from .projection import DenseProjection, Projection, Scratch


class WeightFormat(ABC):
    """How a weight is stored and multiplied. `packed` holds the layer's tensors but `bias`, by name.

    As it stands here, a weight is unpacked in `prepare` and multiplied in the compute dtype. `is_dense`: whether that
    holds. `splits`: rows of what is stored are rows of the weight, in tensors that have one entry per row or one for
    all.
    """

    is_dense = True
    splits = False
    copies_rows = False  # see `Projection`

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """The weight `[out, in]`, written into `out`."""

    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight `[out, in]` in `dtype`, written into `out` where given."""
        if out is None:
            weight = packed["weight"]
            out = torch.empty(self.logical_shape(weight), dtype=dtype, device=weight.device)
        return self.unpack(packed, out)

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        """A projection that computes in `dtype`; what it unpacks lies in `scratch` where one is given."""
        if scratch is None:
            return DenseProjection(self.dequantize(packed, dtype), bias)
        return DenseProjection(self.unpack(packed, scratch.take(self.logical_shape(packed["weight"]))), bias)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """Elements of scratch that `prepare` takes when it computes in `dtype`."""
        return math.prod(self.logical_shape(packed["weight"]))

    @property
    def takes_late_rows(self) -> bool:
        """Whether it has rows made in 8 bits at once, where whoever gives them can: they are nowhere as they were."""
        return False

    def row_bytes(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """Bytes that one row of activations takes while it is multiplied, beside itself and its product in place."""
        return 0

    @property
    def product_bytes(self) -> int:
        """Bytes that a product takes at a time, of however many rows, beside those."""
        return 0

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        """The shape of what a stored weight unpacks to."""
        return weight.shape

    def pieces(self, packed: Mapping[str, Tensor], step: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """At most `step` rows of a weight, and what is stored of them: whatever has as many rows; where it `splits`."""
        num_rows = self.logical_shape(packed["weight"])[0]
        for first in range(0, num_rows, step):
            rows = slice(first, min(first + step, num_rows))
            if rows == slice(0, num_rows):
                yield rows, dict(packed)
                return
            yield rows, {name: x[rows] if x.shape[:1] == (num_rows,) else x for name, x in packed.items()}


@dataclass(frozen=True)
class Plain(WeightFormat):
    """A weight stored in a floating-point dtype without scales: used as it is, or cast when it is used.

    `ops`: what casts 8-bit numbers here, where that is faster than PyTorch.
    """

    ops: RowOps | None = None
    name: str = "plain"

    splits = True

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        if packed["weight"].dtype == dtype:
            return DenseProjection(packed["weight"], bias)
        return super().prepare(packed, bias, dtype, scratch)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        return 0 if packed["weight"].dtype == dtype else packed["weight"].numel()

    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        same = out is None and packed["weight"].dtype == dtype
        return packed["weight"] if same else super().dequantize(packed, dtype, out)

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor) -> Tensor:
        weight = packed["weight"]
        if weight.element_size() > 1:
            return out.copy_(weight)
        if torch.compiler.is_compiling():
            # by an operator: what inductor makes of a cast reads no fp8 before GPUs of compute capability 8.9
            dequantize_rows(weight, torch.ones(1, device=weight.device), out)
            return out
        if self.ops is None:
            return out.copy_(weight)
        return self.ops.dequantize(weight, None, out)


class MultipliedAsStored(WeightFormat):
    """What formats share that multiply a weight as it is stored, its dimensions multiples of `multiple`."""

    is_dense = False
    multiple = 16

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        return 0

    def suits(self, packed: Mapping[str, Tensor]) -> bool:
        """Whether this product takes a layer's tensors."""
        return all(size % self.multiple == 0 for size in packed["weight"].shape)


PLAIN = Plain()
