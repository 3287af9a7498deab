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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.late_rows import GivenRows, tensor_of
from ..kernels.low_rank_reference import TORCH, LowRankOps
from .low_rank import DOWN, LowRank, SideBranch, hidden_of
from .projection import DenseProjection, Projection, Scratch
from .weight_format import PLAIN, Plain, WeightFormat

UNPACKED_BYTES = 64 << 20  # of a weight that is used once: the timestep's projection of Wan 14B has 300 MiB in 16 bits
PIECE_ROWS = 2048  # of a layer outside the blocks that is multiplied as it comes: 20 MiB of Wan 14B's in 16 bits
MOST_TOGETHER = 3  # layers of one size that read the same rows: those of q, k and v

Piece = tuple[slice, dict[str, Tensor]]  # some rows of a weight, and what is stored of them and of their bias
SharedRows = tuple[Any, Tensor | None]  # rows as a form multiplies them, and what a low-rank update made of them


def project_together(projections: Sequence[Projection], x: GivenRows, outs: Sequence[Tensor]) -> None:
    """Write the products of several layers with the same rows.

    The rows are quantised once per form, and read once for all low-rank updates together.
    """
    for project, shared, out in zip(projections, share_rows(projections, x), outs, strict=True):
        write_product(project, shared, out)


def share_rows(projections: Sequence[Projection], x: GivenRows) -> list[SharedRows]:
    """What each of several layers makes its product of with the same rows, for `write_product`.

    Rows that are yet to be made go straight into the layers' form where they have one alone, and none reads the rows
    themselves.
    """
    branches = [project for project in projections if isinstance(project, SideBranch)]
    if not isinstance(x, Tensor) and (branches or len({project.form for project in projections}) > 1):
        x = x.tensor()
    hidden = iter(hidden_of(branches, tensor_of(x)) if branches else ())
    forms: dict[str, Any] = {}
    shared: list[SharedRows] = []
    for project in projections:
        main = project.project if isinstance(project, SideBranch) else project
        if main.form not in forms:
            forms[main.form] = main.quantize(x)
        shared.append((forms[main.form], next(hidden) if isinstance(project, SideBranch) else None))
    return shared


def write_product(project: Projection, shared: SharedRows, out: Tensor) -> None:
    """Write a layer's product with rows that it shares with others."""
    rows, hidden = shared
    if isinstance(project, SideBranch) and hidden is not None:
        project.project.multiply(rows, out=out)
        project.add_up_(out, hidden)
    else:
        project.multiply(rows, out=out)


def may_write_over(project: Projection) -> bool:
    """Whether a layer's product may be written over the rows that it reads; compiled code has places of its own."""
    return project.copies_rows and not torch.compiler.is_compiling()


def project_gelu(project: Projection, x: GivenRows, out: Tensor, gelu_: Callable[[Tensor], None]) -> None:
    """Write GELU (tanh approximation) of a layer's product into `out`; `gelu_` does that in place.

    A low-rank update beside the layer does it while it passes over the product anyway.
    """
    if isinstance(project, SideBranch):
        project.project_gelu(x, out, gelu_)
    elif isinstance(project, DenseProjection) and project.fuses_gelu and not torch.compiler.is_compiling():
        project.multiply_gelu(tensor_of(x), out)
    else:
        project(x, out=out)
        gelu_(out)


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
        packed: dict[str, Tensor] = {
            name: tensor for name, tensor in self._parameters.items() if tensor is not None and name != "bias"
        }
        if self._buffers:  # of LoRAs, and of few forms
            packed.update({name: tensor for name, tensor in self._buffers.items() if tensor is not None})
        return packed

    def prepare(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Projection:
        """Unpack the weight once; the projection takes `[rows, in_features]` in `dtype`.

        LoRAs (`low_rank.py`) are folded into a weight that is unpacked anyway, else they run beside it.
        """
        bias: Tensor | None = self._parameters.get("bias")  # whose name no class has: `self.bias` takes longer
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        packed = self.packed()
        update = LowRank.take_from(packed) if DOWN in packed else None
        return self._prepared(packed, bias, update, dtype, scratch)

    def _prepared(
        self,
        packed: dict[str, Tensor],
        bias: Tensor | None,
        update: LowRank | None,
        dtype: torch.dtype,
        scratch: Scratch | None,
    ) -> Projection:
        project = self.format.prepare(packed, bias, dtype, scratch)
        if self.fuses_gelu and isinstance(project, DenseProjection):
            project = DenseProjection(project.weight, bias, fuses_gelu=True)
        if update is None:
            return project
        if isinstance(project, DenseProjection) and project.weight is not packed["weight"]:
            update.add_to_weight_(project.weight)
            return project
        return SideBranch(project, update, self.low_rank_ops)

    def is_dense(self, dtype: torch.dtype) -> bool:
        """Whether `prepare` gives a `DenseProjection`, known without unpacking anything."""
        packed = self.packed()
        if not self.format.is_dense:
            return False
        if self.format.scratch_elements(packed, dtype):
            return True
        return isinstance(self.format, Plain) and LowRank.take_from(packed) is None

    def scratch_elements(self, dtype: torch.dtype) -> int:
        """Elements of scratch that `prepare` takes when it computes in `dtype`."""
        return self.format.scratch_elements(self.packed(), dtype)

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one row takes while it is multiplied, beside itself and its product in place.

        Of a LoRA beside the layer what its first product makes; layers that share their rows make theirs together.
        """
        packed = self.packed()
        update = LowRank.take_from(packed)
        own = self.format.row_bytes(packed, dtype)
        if update is None or self.format.scratch_elements(packed, dtype):
            return own
        return own + MOST_TOGETHER * update.down.shape[0] * dtype.itemsize

    @property
    def copies_rows(self) -> bool:
        """Whether its products may be written over what they read: see `Projection`."""
        return self.format.copies_rows and DOWN not in self.packed()

    def unpacked_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that `forward` has unpacked at a time when it computes in `dtype`."""
        nbytes = self.scratch_elements(dtype) * dtype.itemsize
        return min(nbytes, UNPACKED_BYTES) if self._multiplies_in_pieces(dtype) else nbytes

    def piece_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of the largest of its `pieces` as it is stored, and of what is unpacked of it in `dtype`."""
        rows, packed = next(self.pieces())
        unpacked = self.scratch_elements(dtype) * dtype.itemsize * (rows.stop - rows.start) // self.out_features
        return sum(tensor.nbytes for tensor in packed.values()), unpacked

    def forward(self, x: Tensor) -> Tensor:
        """The product by itself; a large weight is unpacked and multiplied some of its rows at a time."""
        if not self._multiplies_in_pieces(x.dtype):
            return self.prepare(x.dtype)(x)
        return self.multiply_pieces(x, self.pieces(max(1, UNPACKED_BYTES // (x.dtype.itemsize * self.in_features))))

    def pieces(self, step: int | None = None, stored: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        """The layer `step` rows at a time (None: `PIECE_ROWS`), or whole where its format does not split.

        `stored` are its parameters by name where they are not the layer's own.
        """
        rest = {name: tensor for name, tensor in (stored or self._parameters).items() if tensor is not None}
        shared = {name: rest.pop(name) for name in (DOWN,) if name in rest}  # its rows are none of the weight's
        step = (step or PIECE_ROWS) if self.format.splits else self.out_features
        for rows, piece in self.format.pieces(rest, step):
            yield rows, {**piece, **shared}

    def multiply_pieces(self, x: Tensor, pieces: Iterable[Piece]) -> Tensor:
        """The product by a weight of which the rows of one piece are there at a time."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        buffers = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        for rows, piece in pieces:
            packed = {**piece, **buffers}
            bias = packed.pop("bias", None)
            update = LowRank.take_from(packed)
            project = self._prepared(packed, None if bias is None else bias.to(x.dtype), update, x.dtype, None)
            out[..., rows] = project(x)
            del bias, packed, piece, project, update  # what is unpacked of them goes before the next ones come
        return out

    def _multiplies_in_pieces(self, dtype: torch.dtype) -> bool:
        return self.format.splits and self.scratch_elements(dtype) * dtype.itemsize > UNPACKED_BYTES
