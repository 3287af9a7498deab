"""Models that take turns in the memory of one, as Wan 2.2's two experts do."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .streamed import StreamedModel


class Turns:
    """Models of which one at a time runs: each is read over the host memory of an idle one with the same layout.

    Models are forgotten when nothing else uses them. A model that gave its memory reads its file again for its turn.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakSet[StreamedModel[Any]] = weakref.WeakSet()

    def add(self, model: StreamedModel[Any]) -> None:
        self._models.add(model)
        model.turns = self

    def giver(self, model: StreamedModel[Any]) -> StreamedModel[Any] | None:
        """The idle model whose host memory this one would be read over; None where it has its own or none suits."""
        if model.weights.held is not None:
            return None
        others = (other for other in self._models if other is not model and other.idle)
        return next((other for other in others if model.weights.fits(other.weights)), None)
