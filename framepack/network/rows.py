"""What blocks of FramePack do with some rows of tokens at a time: norms, products and sums around attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...fused.ops import Rope
from ...transformer.feed_forward import Add, Normed
from ...transformer.layers import Scale
from ...transformer.nag import NagSettings
from ...transformer.rows import rows_of
from ...transformer.workspace import Attend, Workspace
from ...weights.kernels.late_rows import GivenRows, tensor_of
from ...weights.linear.linear import Linear, project_gelu, project_together
from ...weights.linear.projection import Projection


@dataclass(frozen=True)
class Negative:
    """A negative prompt in a block: its text has the rows from `first` on, and guides what the image rows attend to.

    `modulation [k, dim]` fp32 is the block's, made of that prompt: for the rows of its text alone. Of the rows of all
    cards that share the pass the first `all_images` are image, and its text's those from `all_first` on.
    """

    first: int
    modulation: Tensor
    settings: NagSettings
    all_images: int = 0
    all_first: int = 0

    def attend_all(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What all rows make of attention beside their own prompt, and the image rows beside the negative one.

        `[1, rows, heads, D]` each; of the second one other rows are of no use.
        """
        images, first = self.all_images, self.all_first
        made, opposed = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))
        made[:, :first] = attend(q[:, :first], k[:, :first], v[:, :first])
        beside = [torch.cat([rows[:, :images], rows[:, first:]], 1) for rows in (q, k, v)]
        attended = attend(beside[0], beside[1], beside[2])
        opposed[:, :images], made[:, first:] = attended[:, :images], attended[:, images:]
        return made, opposed


def modulated(
    x: Tensor, modulation: Tensor, eps: float, work: Workspace, kept: Tensor | None = None
) -> tuple[Normed, Add]:
    """How rows of `x` are normed (into `kept` where given) and added to, by shift, scale and gate `[3, dim]`."""
    shift, scale, gate = modulation
    rows_per_group = x.shape[0]  # one vector for all rows
    gate = work.gate(gate)

    def add(rows: slice, y: Tensor) -> None:
        work.ops.gated_add_(x[rows], y, gate[None], 0, rows_per_group)

    return norm_by(x, shift, scale, eps, work, kept), add


def modulated_text(
    x: Tensor,
    modulation: Tensor,
    vectors: slice,
    negative: Negative | None,
    eps: float,
    work: Workspace,
    kept: Tensor | None = None,
) -> tuple[Normed, Add]:
    """The same by three vectors of a block's `modulation`, rows of a negative prompt by those of its own."""
    normed, add = modulated(x, modulation[vectors], eps, work, kept)
    if negative is None:
        return normed, add
    first, (own_normed, own_add) = negative.first, modulated(x, negative.modulation[vectors], eps, work)

    def both_normed(rows: slice) -> GivenRows:
        if rows.stop <= first:
            return normed(rows)
        if rows.start >= first:
            return own_normed(rows)
        parts = normed(slice(rows.start, first)), own_normed(slice(first, rows.stop))
        return torch.cat([tensor_of(part) for part in parts])

    def both_add(rows: slice, y: Tensor) -> None:
        split = min(max(first, rows.start), rows.stop)
        if rows.start < split:
            add(slice(rows.start, split), y[: split - rows.start])
        if split < rows.stop:
            own_add(slice(split, rows.stop), y[split - rows.start :])

    return both_normed, both_add


def norm_by(x: Tensor, shift: Tensor, scale: Tensor, eps: float, work: Workspace, kept: Tensor | None = None) -> Normed:
    """How rows of `x` are normed, with shift and scale `[dim]` for all of them; into those of `kept` where given."""
    rows_per_group, eps = x.shape[0], work.eps(eps)

    def normed(rows: slice) -> GivenRows:
        if kept is None:
            return work.ops.modulated_rows(x[rows], shift[None], scale[None], 0, rows_per_group, eps)
        return work.ops.modulated_norm(x[rows], shift[None], scale[None], 0, rows_per_group, eps, kept[rows])

    return normed


def project_qkv(
    layers: Sequence[Linear],
    norms: tuple[Scale, Scale],
    normed: Normed,
    span: slice,
    rope: Rope,
    eps: float,
    work: Workspace,
) -> None:
    """Fill those rows of the workspace's q, k and v; q and k are normed and turned."""
    q, k, v = work.queries, work.keys, work.values
    norm_q, norm_k = norms
    work.scratch.reset()
    projections = [layer.prepare(work.dtype, work.scratch) for layer in layers]
    for rows in work.chunks(span.start, span.stop):
        project_together(projections, normed(rows), (q[rows], k[rows], v[rows]))
        work.ops.rms_norm_(q[rows], norm_q.weight, eps, rope, rows.start)
        work.ops.rms_norm_(k[rows], norm_k.weight, eps, rope, rows.start)


def spare_rows(negative: Negative | None, work: Workspace) -> Tensor | None:
    """q's bytes where what attention made does not lie in them."""
    return work.queries if work.queries_are_free and negative is None else None


def project_out(layer: Linear, attended: Tensor, spare: Tensor | None, add: Add, span: slice, work: Workspace) -> None:
    """Add the projection of those rows of what attention made; the product is in `spare` rows where there are any."""
    work.scratch.reset()
    project = layer.prepare(work.dtype, work.scratch)
    for rows in work.chunks(span.start, span.stop):
        add(rows, project(attended[rows], out=None if spare is None else spare[rows]))


def widen_into(project: Projection, x: GivenRows, out: Tensor, work: Workspace) -> None:
    """The GELU of a projection of `x [rows, dim]`, into columns of wider rows.

    Products are written to whole rows only (8-bit ones, and compiled code), so they come here by a tensor of their
    own, of so few rows that it is at most twice as large as `x`.
    """
    step = min(x.shape[0], max(1, 2 * x.shape[0] * x.shape[1] // out.shape[1]))
    buffer = torch.empty(step, out.shape[1], dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], step):
        rows = x[first : first + step]
        hidden = rows_of(buffer, 0, rows.shape[0], out.shape[1])
        project_gelu(project, rows, hidden, work.ops.gelu_)
        out[first : first + step].copy_(hidden)
