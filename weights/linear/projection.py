"""What a prepared layer is: a product with a weight that is unpacked once, and the memory that it is unpacked into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.late_rows import GivenRows, tensor_of


class Projection:
    """`x [rows, in] -> [rows, out]`, written into `out` where given; `form` names what `quantize` makes of x.

    No ABC: asking what kind of one this is would take as long as a view of a tensor, and every product asks.
    """

    form = "dense"
    copies_rows = False  # what `quantize` makes does not lie in the rows: the product may be written over them

    def __call__(self, x: GivenRows, out: Tensor | None = None) -> Tensor:
        return self.multiply(self.quantize(x), out)

    def quantize(self, x: GivenRows) -> Any:
        """The rows as `multiply` takes them; any projection of the same `form` makes the same of them."""
        return tensor_of(x)

    def multiply(self, rows: Any, out: Tensor | None = None) -> Tensor:
        """The product with rows that a projection of the same `form` quantised."""
        raise NotImplementedError


class DenseProjection(Projection):
    """`x @ weight.T + bias` with everything in one dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, fuses_gelu: bool = False):
        self.weight, self.bias = weight, bias
        self.fuses_gelu = fuses_gelu and bias is not None  # see `gemms.fuses_gelu`

    def multiply(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.nn.functional.linear(rows, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=out)
        return torch.addmm(self.bias, rows, self.weight.t(), out=out)

    def multiply_gelu(self, rows: Tensor, out: Tensor) -> None:
        """GELU (tanh approximation) of the product, in the product's own kernel."""
        assert self.bias is not None
        torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True, out=out)

    def split(self, num_inputs: int) -> tuple[DenseProjection, DenseProjection]:
        """Two that add up to this one: of the first `num_inputs` inputs, and of the others (with the bias)."""
        return DenseProjection(self.weight[:, :num_inputs], None), DenseProjection(
            self.weight[:, num_inputs:], self.bias, self.fuses_gelu
        )


class Scratch:
    """A reused run of elements on one device, handed out front to back until `reset`.

    It grows when asked for more than it has; sized well from the start it never touches the allocator.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, num_elements: int = 0):
        self.buffer = torch.empty(num_elements, device=device, dtype=dtype)
        self.used = 0

    def reset(self, used: int = 0) -> None:
        """Forget what was handed out after the first `used` elements; the caller no longer uses it."""
        self.used = used

    def give_back(self, taken: Tensor) -> None:
        """The tensor taken last is no longer used."""
        self.used -= taken.numel()

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """An uninitialised tensor of `shape`, valid until the next `reset`."""
        strides, num = [], 1
        for size in reversed(shape):
            strides.append(num)
            num *= size
        if self.used + num > self.buffer.numel():
            self.buffer = torch.empty(self.used + num, device=self.buffer.device, dtype=self.buffer.dtype)
        # by strides: torch.compile then writes to it where it lies
        view = self.buffer.as_strided(shape, strides[::-1], self.used)
        self.used += num
        return view
