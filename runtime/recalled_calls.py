"""Calls of models that a record answered, the last of which are made once more where a step cache needs what they left.

A residual is too large to be kept on the disk in every step, and is made again bit for bit by the pass that left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..sampling.caching.step_cache import first_needed
from .step_record import StepRecord
from .streamed import StreamedModel

Learnt = list[list[Tensor]]  # of each model, see `StreamedModel.learnt`


class RecalledCalls:
    """Of one run of these models, since its last call that was computed."""

    def __init__(self, models: Sequence[StreamedModel[Any]]) -> None:
        self._models = models
        self._calls: list[tuple[Callable[[], object], Learnt]] = []
        self._before: Learnt | None = None  # what was learnt before the first of them

    def answers(
        self, record: StepRecord, x: Tensor, sigma: Tensor, compute: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[Tensor]:
        """What `compute` makes of `x`, or made of it before: the record's answer to the run's next call."""
        computed = False

        def made_now() -> list[Tensor]:
            nonlocal computed
            computed = True
            self._catch_up()
            return [*compute(x), *self._learnt()]

        made = record.answers({"x": x, "sigma": sigma.to(x.device)}, made_now)
        count = len(made) - sum(model.num_learnt for model in self._models)
        if not computed:  # as if the call had been made just now
            asked = x.clone()  # samplers may write into it
            self._answered(lambda: compute(asked), made[count:])
        return made[:count]

    def _learnt(self) -> list[Tensor]:
        """What all models learnt, to be recorded with a call's answer."""
        return [state for model in self._models for state in model.learnt()]

    def _answered(self, again: Callable[[], object], states: Sequence[Tensor]) -> None:
        """The record answered a call, which `again` would make, and had these states with it."""
        if self._before is None:
            self._before = [model.learnt() for model in self._models]
        learnt = self._split(states)
        self._learn(learnt)
        self._calls.append((again, learnt))
        gone = min((self._first_needed(index) for index in self._caching), default=len(self._calls))
        if gone:
            self._before = self._calls[gone - 1][1]
        del self._calls[:gone]  # with what they were asked

    def _catch_up(self) -> None:
        """Before a call that is computed: the models' step caches are as if those before had been made just now."""
        calls, self._calls = self._calls, []
        if not calls or self._before is None:
            return
        self._learn(self._before)
        for again, learnt in calls:
            for index in self._caching:
                cache = self._models[index].step_cache
                assert cache is not None
                cache.repeat(learnt[index][-1])
            again()
        for index in self._caching:
            cache = self._models[index].step_cache
            assert cache is not None
            cache.end_repeating()
        self._learn(calls[-1][1])

    @property
    def _caching(self) -> list[int]:
        return [index for index, model in enumerate(self._models) if model.step_cache is not None]

    def _first_needed(self, index: int) -> int:
        return first_needed([learnt[index][-1] for _, learnt in self._calls])

    def _split(self, states: Sequence[Tensor]) -> Learnt:
        rest, learnt = list(states), []
        for model in self._models:
            learnt.append(rest[: model.num_learnt])
            rest = rest[model.num_learnt :]
        return learnt

    def _learn(self, learnt: Learnt) -> None:
        for model, states in zip(self._models, learnt, strict=True):
            model.learn(states)
