"""Cards that share a pass, as its attention sees them where that is more than a backend's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ..team.share import Part
from ..team.spans import even_spans

T = TypeVar("T")


@dataclass(frozen=True)
class CardsTogether:
    """Each of the cards has some heads of all tokens; `heads` are this one's."""

    part: Part
    heads: slice

    @classmethod
    def of(cls, part: Part | None, num_heads: int) -> CardsTogether | None:
        """Those of a pass; None where one card makes it."""
        return None if part is None else cls(part, even_spans(num_heads, len(part.spans))[part.index])

    @property
    def is_first(self) -> bool:
        return self.part.index == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first of the cards decides."""
        return self.part.share.agree(decide)

    def total(self, own: Tensor) -> Tensor:
        """The sum of all cards' tensors, the same bits on each."""
        return self.part.total(own)
