"""Resolutions of the Wan 2.2 video autoencoder with their shortcuts over pixels and channels; see `blocks.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from .blocks import FrameChanger, frames_through, plan_layers
from .rows import Level, StripPlan
from .strip import Strip


class DownStage(FrameChanger):
    """One resolution of the Wan 2.2 encoder: its layers beside a shortcut that folds pixels into averaged channels."""

    def __init__(
        self, layers: Sequence[nn.Module], in_dim: int, out_dim: int, time_factor: int, space_factor: int
    ) -> None:
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.time_factor, self.space_factor = time_factor, space_factor
        num_values = in_dim * time_factor * space_factor**2
        if num_values % out_dim:
            raise ValueError(
                f"a Wan 2.2 encoder stage cannot fold {in_dim} channels into {out_dim}: {num_values} values per "
                f"position do not divide by {out_dim}; choose dim_mult so that they do"
            )

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        inputs = plan_layers(list(self.downsamples), plan, out)
        plan.add(self, inputs, out, lambda row: self.space_factor * row)
        plan.add_seam(self, self.in_dim)
        return inputs

    def frames(self, x: Tensor, strip: Strip) -> Iterator[Tensor]:
        rows, seam, number = strip.rows(self), strip.seam(self, x), strip.count(self)
        blocks = seam.with_above(x)
        # Rows above lie where those for the strip below will.
        needed = x if blocks and blocks[0] is x else torch.cat([x[:, :, :0], *blocks], dim=2)
        needed = needed[:, :, : self.space_factor * rows.out]
        seam.keep(blocks)
        pair = [needed]
        if self.time_factor > 1:
            before = strip.swap(self, needed if number % 2 else None)
            # The lone first frame is averaged with black, as in training.
            pair = [torch.zeros_like(needed) if before is None else before, needed]
        for out in frames_through(list(self.downsamples), x, strip):
            yield out.add_(self._averaged(pair))

    def _averaged(self, frames: Sequence[Tensor]) -> Tensor:
        fs = self.space_factor
        folded = rearrange(list(frames), "ft b c (h fh) (w fw) -> b (c ft fh fw) h w", fh=fs, fw=fs)
        return folded.unflatten(1, (self.out_dim, -1)).mean(dim=2)


class UpStage(FrameChanger):
    """One resolution of the Wan 2.2 decoder: its layers beside a shortcut that spreads channels over new pixels."""

    def __init__(
        self, layers: Sequence[nn.Module], in_dim: int, out_dim: int, time_factor: int, space_factor: int
    ) -> None:
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.in_dim, self.time_factor, self.space_factor = in_dim, time_factor, space_factor
        self.num_sources = in_dim // out_dim  # input channels that one output channel is spread from
        num_pixels = time_factor * space_factor**2
        if space_factor > 1 and (in_dim % out_dim or num_pixels % self.num_sources):
            raise ValueError(
                f"a Wan 2.2 decoder stage cannot spread {in_dim} channels over {out_dim} of {num_pixels} pixels each; "
                f"choose dim_mult so that {out_dim} divides {in_dim} and the quotient divides {num_pixels}"
            )

    def plan_rows(self, plan: StripPlan, out: Level) -> Level:
        inputs = plan_layers(list(self.upsamples), plan, out)
        if self.space_factor > 1:  # the last stage keeps its resolution and has no shortcut
            plan.add(self, inputs, out, lambda row: row // 2)
            plan.add_seam(self, self.in_dim)
        return inputs

    def frames(self, x: Tensor, strip: Strip) -> Iterator[Tensor]:
        if self.space_factor == 1:
            yield from frames_through(list(self.upsamples), x, strip)
            return
        seam, rows = strip.seam(self, x), strip.rows(self)
        blocks = seam.with_above(x)
        # The first frame leads to one, the last of those that it would spread to.
        time = self.time_factor - 1 if strip.count(self) == 0 else 0
        for out in frames_through(list(self.upsamples), x, strip):
            row = rows.offset
            for block in blocks:
                self._add_spread(out, block, row, time)
                row += self.space_factor * block.shape[2]
            time += 1
            yield out
        seam.keep(blocks)

    def _add_spread(self, out: Tensor, x: Tensor, first: int, time: int) -> None:
        """Add what rows of the input spread to, the first of them to row `first`; what falls outside is left out."""
        # Written as one strided addition per new pixel: the enlarged shortcut never exists.
        fs = self.space_factor
        repeats = self.time_factor * fs * fs // self.num_sources
        for dh in range(fs):
            row = first + dh
            skipped = -(row // fs) if row < 0 else 0
            target_rows = out[:, :, row + fs * skipped :: fs]
            count = min(target_rows.shape[2], x.shape[2] - skipped)
            if count <= 0:
                continue
            for dw in range(fs):
                source = ((time * fs + dh) * fs + dw) // repeats
                target_rows[:, :, :count, dw::fs] += x[:, source :: self.num_sources, skipped : skipped + count]
