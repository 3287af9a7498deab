"""Linear layers whose weight may be stored in another form than the one it computes in.

A weight is plain named tensors and a format; there are no tensor subclasses. A layer is used in two steps, so
that a weight is unpacked once however many chunks of tokens go through it:

    project = layer.prepare(torch.bfloat16, scratch)
    for rows in chunks:
        project(x[rows], out=y[rows])

Formats that multiply 8-bit numbers quantise their rows first; layers that read the same rows share that
(`project_together`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .low_rank import LowRank, SideBranch, hidden_of
from .low_rank_ops import TORCH, LowRankOps


class Projection(Protocol):
    """`x [rows, in] -> [rows, out]`, written into `out` where given: `multiply(quantize(x), out)`."""

    @property
    def form(self) -> str:
        """Names what `quantize` makes; "dense" is x itself."""
        ...

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...

    def quantize(self, x: Tensor) -> Any:
        """The rows as `multiply` takes them; any projection of the same `form` makes the same of them."""
        ...

    def multiply(self, rows: Any, out: Tensor | None = None) -> Tensor:
        """The product with rows that a projection of the same `form` quantised."""
        ...


def project_together(projections: Sequence[Projection], x: Tensor, outs: Sequence[Tensor]) -> None:
    """Write the products of several layers with the same rows.

    The rows are quantised once per form, and read once for all low-rank updates together.
    """
    hidden = iter(hidden_of([project for project in projections if isinstance(project, SideBranch)], x))
    forms: dict[str, Any] = {}
    for project, out in zip(projections, outs, strict=True):
        main = project.project if isinstance(project, SideBranch) else project
        if main.form not in forms:
            forms[main.form] = main.quantize(x)
        main.multiply(forms[main.form], out=out)
        if isinstance(project, SideBranch):
            project.add_up_(out, next(hidden))


def project_gelu(project: Projection, x: Tensor, out: Tensor, gelu_: Callable[[Tensor], None]) -> None:
    """Write GELU (tanh approximation) of a layer's product into `out`; `gelu_` does that in place.

    A low-rank update beside the layer does it while it passes over the product anyway.
    """
    if isinstance(project, SideBranch):
        project.project_gelu(x, out, gelu_)
    elif isinstance(project, DenseProjection) and project.fuses_gelu and not torch.compiler.is_compiling():
        project.multiply_gelu(x, out)
    else:
        project(x, out=out)
        gelu_(out)


class Scratch:
    """A reused run of elements on one device, handed out front to back until `reset`.

    It grows when asked for more than it has; sized well from the start it never touches the allocator.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, num_elements: int = 0):
        self.buffer = torch.empty(num_elements, device=device, dtype=dtype)
        self.used = 0

    def reset(self) -> None:
        """Forget what was handed out; the caller no longer uses it."""
        self.used = 0

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """An uninitialised tensor of `shape`, valid until the next `reset`."""
        num = torch.Size(shape).numel()
        if self.used + num > self.buffer.numel():
            self.buffer = torch.empty(self.used + num, device=self.buffer.device, dtype=self.buffer.dtype)
        # by strides: torch.compile then writes to it where it lies
        view = self.buffer.as_strided((num,), (1,), self.used).view(shape)
        self.used += num
        return view


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


class DenseProjection:
    """`x @ weight.T + bias` with everything in one dtype."""

    form = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None, fuses_gelu: bool = False):
        self.weight, self.bias = weight, bias
        self.fuses_gelu = fuses_gelu and bias is not None  # see `gemms.fuses_gelu`

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.multiply(x, out)

    def quantize(self, x: Tensor) -> Tensor:
        return x

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
    from ..kernels.row_op import dequantize_rows

    dequantize_rows(weight, torch.ones(1, device=weight.device), out)
    return out


PLAIN = Plain()


class Linear(nn.Module):
    """A linear layer over `[..., in_features]`, its weight held in a `WeightFormat`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format: WeightFormat = PLAIN
        self.low_rank_ops: LowRankOps = TORCH
        self.fuses_gelu = False
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype), requires_grad=False
        )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)

    def packed(self) -> dict[str, Tensor]:
        """The weight's tensors by name, as its format knows them."""
        tensors = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and name != "bias"}

    def prepare(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Projection:
        """Unpack the weight once; the projection takes `[rows, in_features]` in `dtype`.

        LoRAs (`low_rank.py`) are folded into a weight that is unpacked anyway, else they run beside it.
        """
        bias = None if self.bias is None else self.bias.to(dtype)
        packed = self.packed()
        update = LowRank.take_from(packed)
        project = self.format.prepare(packed, bias, dtype, scratch)
        if isinstance(project, DenseProjection):
            project = DenseProjection(project.weight, bias, self.fuses_gelu)
        if update is None:
            return project
        if isinstance(project, DenseProjection) and project.weight is not packed["weight"]:
            update.add_to_weight_(project.weight)
            return project
        return SideBranch(project, update, self.low_rank_ops)

    def is_dense(self, dtype: torch.dtype) -> bool:
        """Whether `prepare` gives a `DenseProjection`, known without unpacking anything."""
        packed = self.packed()
        if self.format.scratch_elements(packed, dtype):
            return True
        return self.format is PLAIN and LowRank.take_from(packed) is None

    def scratch_elements(self, dtype: torch.dtype) -> int:
        """Elements of scratch that `prepare` takes when it computes in `dtype`."""
        return self.format.scratch_elements(self.packed(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.prepare(x.dtype)(x)
