"""A transformer's feed-forward in the workspace's bytes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..weights.kernels.late_rows import GivenRows
from ..weights.linear.linear import Linear, may_write_over, project_gelu
from .rows import rows_of, within
from .workspace import Workspace

Normed = Callable[[slice], GivenRows]  # a row range -> those rows of x, normed: [rows, dim]
Add = Callable[[slice, Tensor], None]  # adds to those rows of x


def feed_forward(widen: Linear, narrow: Linear, normed: Normed, add: Add, span: slice, work: Workspace) -> None:
    """Linear, tanh-GELU, linear over the rows of `span`, for as many at a time as there is room for hidden ones."""
    for part in work.ranges(span.start, span.stop, work.hidden_rows):
        start, stop = part.start, part.stop
        work.scratch.reset()
        project = widen.prepare(work.dtype, work.scratch)
        for rows in work.chunks(start, stop):
            project_gelu(project, normed(rows), work.hidden_at(within(rows, start)), work.ops.gelu_)
        work.scratch.reset()
        project = narrow.prepare(work.dtype, work.scratch)
        over_hidden = may_write_over(project) and narrow.out_features <= narrow.in_features
        for rows in work.chunks(start, stop):
            part = within(rows, start)
            first, count = part.start * narrow.in_features, part.stop - part.start
            out = rows_of(work.pool, first, count, narrow.out_features) if over_hidden else None
            add(rows, project(work.hidden_at(part), out=out))
