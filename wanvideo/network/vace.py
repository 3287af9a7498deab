"""VACE: a branch of blocks through which control videos steer the others.

Source: ali-vilab/VACE and Wan-Video/Wan2.1 (`wan/modules/vace_model.py`); parameter names are theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.workspace import Workspace
from ...weights.linear.linear import Linear
from .blocks import Context, KeysValues, Pass, WanBlock
from .config import WanConfig


class VaceBlock(WanBlock):
    """A block over the control tokens; a projection of its result is added to the video's.

    The first one also has `before_proj`, through which the control tokens join the video's at the start.
    """

    stages = (*WanBlock.stages[:2], (*WanBlock.stages[2], "after_proj."))

    def __init__(
        self,
        config: WanConfig,
        first: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, device, dtype)
        if first:
            self.before_proj = Linear(config.dim, config.dim, device=device, dtype=dtype)
        self.after_proj = Linear(config.dim, config.dim, device=device, dtype=dtype)

    def advance(self, state: Pass, shown: Context | KeysValues) -> None:
        work = state.work
        for control in state.controls:
            self.run(control.tokens, state, shown)
            work.scratch.reset()
            project = self.after_proj.prepare(work.dtype, work.scratch)
            bias = None if work.residual_scale == 1 else self.after_proj.bias
            for rows in work.chunks():
                added = project(control.tokens[rows])
                if bias is not None:  # beside tokens times a factor it would be too large
                    added.sub_(bias.to(added.dtype) * (1 - work.residual_scale))
                state.x[rows].add_(added, alpha=control.strength)
                del added  # before there are the next rows

    def join_(self, control: Tensor, x: Tensor, work: Workspace) -> None:
        """Control tokens `[rows, dim]`, in place, as they enter the first block beside the video's `x`."""
        work.scratch.reset()
        project = self.before_proj.prepare(work.dtype, work.scratch)
        for rows in work.chunks():
            control[rows] = work.gate(project(control[rows])).add_(x[rows])

    def scratch_elements(self, dtype: torch.dtype) -> int:
        before = self.before_proj.scratch_elements(dtype) if hasattr(self, "before_proj") else 0
        return max(super().scratch_elements(dtype), self.after_proj.scratch_elements(dtype), before)


def vace_places(num_layers: int, vace_layers: int) -> dict[int, int]:
    """`{block: VACE block that follows it}`: they are spread evenly from the first block on."""
    if not vace_layers:
        return {}
    places = range(0, num_layers, num_layers // vace_layers)
    return {block: index for index, block in enumerate(places) if index < vace_layers}
