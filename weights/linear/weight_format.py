"""How a weight is stored: the protocol of all formats, the base of those that are unpacked, and the plain one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.rows import dequantize_rows
from .projection import DenseProjection, Projection, Scratch


class WeightFormat(Protocol):
    """How a weight is stored and multiplied. `packed` holds the layer's tensors but `bias`, by name."""

    @property
    def name(self) -> str: ...

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        """A projection that computes in `dtype`; what it unpacks lies in `scratch` where one is given."""
        ...

    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight `[out, in]` in `dtype`, written into `out` where given."""
        ...

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        """Elements of scratch that `prepare` takes when it computes in `dtype`."""
        ...


class Unpacked(ABC):
    """What formats share whose weight is unpacked in `prepare`, into scratch, and multiplied in the compute dtype."""

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        out = scratch.take(self.logical_shape(packed["weight"])) if scratch else None
        return DenseProjection(self.dequantize(packed, dtype, out), bias)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        return math.prod(self.logical_shape(packed["weight"]))

    def logical_shape(self, weight: Tensor) -> tuple[int, ...]:
        """The shape of what a stored weight unpacks to."""
        return weight.shape

    @abstractmethod
    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor: ...


class Plain:
    """A weight stored in a floating-point dtype without scales: used as it is, or cast when it is used."""

    name = "plain"

    def prepare(
        self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype, scratch: Scratch | None
    ) -> Projection:
        weight = packed["weight"]
        if weight.dtype != dtype:
            weight = self.dequantize(packed, dtype, scratch.take(weight.shape) if scratch else None)
        return DenseProjection(weight, bias)

    def scratch_elements(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> int:
        weight = packed["weight"]
        return 0 if weight.dtype == dtype else weight.numel()

    def dequantize(self, packed: Mapping[str, Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        weight = packed["weight"]
        if weight.element_size() == 1 and torch.compiler.is_compiling():
            out = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
            return _cast_in_compiled_code(weight, out)
        return weight.to(dtype) if out is None else out.copy_(weight)


def _cast_in_compiled_code(weight: Tensor, out: Tensor) -> Tensor:
    """`weight [rows, columns]` fp8 into `out`, by an operator: what inductor makes reads no fp8 before GPUs of 8.9."""
    dequantize_rows(weight, torch.ones(1, device=weight.device), out)
    return out


PLAIN = Plain()
