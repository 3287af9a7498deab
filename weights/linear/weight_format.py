"""How a weight is stored and multiplied: what formats have in common, and the plain one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.rows import dequantize_rows
from .projection import DenseProjection, Projection, Scratch


class WeightFormat(ABC):
    """How a weight is stored and multiplied. `packed` holds the layer's tensors but `bias`, by name.

    As it stands here, a weight is unpacked in `prepare` and multiplied in the compute dtype.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight `[out, in]` in `dtype`, written into `out` where given."""

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        """A projection that computes in `dtype`; what it unpacks lies in `scratch` where one is given."""
        out = scratch.take(self.logical_shape(packed["weight"])) if scratch else None
        return DenseProjection(self.dequantize(packed, dtype, out), bias)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """Elements of scratch that `prepare` takes when it computes in `dtype`."""
        return math.prod(self.logical_shape(packed["weight"]))

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        """The shape of what a stored weight unpacks to."""
        return weight.shape


class Plain(WeightFormat):
    """A weight stored in a floating-point dtype without scales: used as it is, or cast when it is used."""

    name = "plain"

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        if packed["weight"].dtype == dtype:
            return DenseProjection(packed["weight"], bias)
        return super().prepare(packed, bias, dtype, scratch)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        return 0 if packed["weight"].dtype == dtype else packed["weight"].numel()

    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        weight = packed["weight"]
        if weight.element_size() > 1 or not torch.compiler.is_compiling():
            return weight.to(dtype) if out is None else out.copy_(weight)
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
        # by an operator: what inductor makes of a cast reads no fp8 before GPUs of compute capability 8.9
        dequantize_rows(weight, torch.ones(1, device=weight.device), out)
        return out


class MultipliedAsStored(WeightFormat):
    """What formats share that multiply a weight as it is stored."""

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        return 0

    @abstractmethod
    def suits(self, packed: Mapping[str, Tensor]) -> bool:
        """Whether this product takes a layer's tensors."""


PLAIN = Plain()
