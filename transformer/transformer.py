"""What a streamer, transient weights and the memory plan know of a transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..team.share import Share
from ..weights.linear.linear import Linear, Piece
from .execution import Execution
from .workspace import Arrive, Workspace, all_there


class Bring(Protocol):
    """Brings weights to the device, into `spare`: bytes of a tensor that nobody needs meanwhile, where there is one."""

    def __call__(self, modules: Sequence[nn.Module], spare: Tensor | None) -> AbstractContextManager[None]:
        """Whole modules, for a `with` block."""
        ...

    def pieces(self, layer: Linear, spare: Tensor | None) -> Iterable[Piece]:
        """A layer some rows at a time: those of a piece are gone when the next one is asked for."""
        ...


class HereAlready:
    """See `Bring`; all weights are on the device."""

    def __call__(self, modules: Sequence[nn.Module], spare: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext()

    def pieces(self, layer: Linear, spare: Tensor | None) -> Iterable[Piece]:
        return layer.pieces()


class BroughtLayers(nn.Sequential):
    """Layers whose weights are brought some rows at a time: the same rows wherever they lie, so the same bits.

    `dtype` is what `x` is turned to: here, as a call of a module holds what it was given until it ends.
    """

    def forward(
        self,
        x: Tensor,
        bring: Bring = HereAlready(),  # noqa: B008
        spare: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        x = x.to(dtype or x.dtype)
        for layer in self:
            x = layer.multiply_pieces(x, bring.pieces(layer, spare)) if isinstance(layer, Linear) else layer(x)
        return x


class Block(nn.Module):
    """A part of a transformer that can be streamed by itself.

    `stages` are how the names of its tensors begin that it computes with first, then, and so on, where it says so
    (`Workspace.arrive`) before it goes on with the next ones; none: it needs all at once.
    """

    stages: tuple[tuple[str, ...], ...] = ()

    def scratch_elements(self, dtype: torch.dtype) -> int:
        """The most elements that this block has unpacked at a time when it computes in `dtype`."""
        raise NotImplementedError

    def busy_modules(self) -> list[nn.Module]:
        """Those whose layers see thousands of rows: worth multiplying in 8 bits."""
        return [self]


class Transformer(nn.Module):
    """A model that is a sequence of blocks, with a little before and behind them."""

    stream: Callable[[Sequence[nn.Module]], Iterator[nn.Module]] = iter  # or a BlockStreamer
    bring: Bring = HereAlready()  # or TransientWeights
    arrive: Arrive = staticmethod(all_there)  # or that of a BlockStreamer
    fits_any_size = False  # whether its blocks can be compiled once for all sizes (`Execution.any_size`)
    share: Share | None = None  # of a pass that several cards make together; all of them begin it
    sample: int | None = None  # the first of those that it has of a batch, where other cards have others
    counted_scratch: int | None = None  # `scratch_elements`, counted once by who starts a model for many passes

    def __init__(self) -> None:
        super().__init__()
        self.execution = Execution()

    def ordered_blocks(self) -> Mapping[str, Block]:
        """All blocks by name, in the order of a pass."""
        raise NotImplementedError

    def outer_modules(self) -> list[nn.Module]:
        """Modules beside the blocks that are worth compiling."""
        return []

    def make_room(self, work: Workspace) -> None:
        """Ask for what blocks have for a moment before they run (`Workspace.make_room`), until there is none."""
        if not work.make_room():
            self.execution = replace(self.execution, room_bytes=0)

    def scratch_elements(self) -> int:
        """The most weight elements that are unpacked at a time."""
        if self.counted_scratch is not None:
            return self.counted_scratch
        dtype = self.execution.dtype
        return max((block.scratch_elements(dtype) for block in self.ordered_blocks().values()), default=0)
