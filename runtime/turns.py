"""Models that take turns in the memory of one, as Wan 2.2's two experts do."""

from __future__ import annotations

import weakref
from typing import Any

from .opened import OpenedModel


class Turns:
    """Models of which one at a time runs: each is read over the host memory of an idle one with the same layout.

    Models are forgotten when nothing else uses them. A model that gave its memory reads its file again for its turn.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakSet[OpenedModel[Any]] = weakref.WeakSet()

    def add(self, model: OpenedModel[Any]) -> None:
        self._models.add(model)
        model.partners = self._models
