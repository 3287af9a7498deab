"""Which step a sampler's call of the model is of, and how often the device is asked for its noise level."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from lowvram_video.sampling.caching.sampler_steps import Call, SamplerSteps
from torch import Tensor

LEVELS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.2, 0.0])

Model = Callable[[float], None]
Done = Callable[[int], None]
Solver = Callable[[list[float], Model, Done], None]


class Level(torch.Tensor):
    """Counts how often the host reads it."""

    reads = 0

    def flatten(self) -> Tensor:  # type: ignore[override]
        Level.reads += 1
        return self.as_subclass(torch.Tensor).flatten()


def euler(levels: list[float], model: Model, done: Done) -> None:
    for index, level in enumerate(levels[:-1]):
        model(level)
        done(index)


def told_before(levels: list[float], model: Model, done: Done) -> None:
    """As uni_pc does it: a step is over before the next call, and the first step before any."""
    for index, level in enumerate(levels[:-1]):
        done(index)
        model(level)


def heun(levels: list[float], model: Model, done: Done) -> None:
    for index, (level, after) in enumerate(itertools.pairwise(levels)):
        model(level)
        done(index)
        if after:
            model(after)


def dpm_2(levels: list[float], model: Model, done: Done) -> None:
    for index, (level, after) in enumerate(itertools.pairwise(levels)):
        model(level)
        done(index)
        if after:
            model((level * after) ** 0.5)


def heunpp2(levels: list[float], model: Model, done: Done) -> None:
    """Two levels ahead, and back."""
    for index, level in enumerate(levels[:-1]):
        model(level)
        done(index)
        for after in levels[index + 1 : index + 3]:
            if after:
                model(after)


def sampled(solver: Solver, passes: int = 2) -> tuple[list[Call], int]:
    """The calls that a run is told of, and how often the device was waited for."""
    steps, calls = SamplerSteps(), list[Call]()
    levels = LEVELS.as_subclass(Level)
    Level.reads = 0

    def model(level: float) -> None:
        told = torch.full((1,), level).as_subclass(Level)
        made = [steps.at(levels, told) for _ in range(passes)]
        assert all(each is made[0] for each in made), "all passes of a call are of one step"
        calls.append(made[0])

    solver(LEVELS.tolist(), model, steps.done)
    return calls, Level.reads


@pytest.mark.parametrize(
    "solver, steps",
    [(euler, [0, 1, 2, 3, 4]), (told_before, [0, 1, 2, 3, 4]), (heun, [0, 1, 1, 2, 2, 3, 3, 4, 4]),
     (dpm_2, [0, 0, 1, 1, 2, 2, 3, 3, 4]), (heunpp2, [0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 4])],
)  # fmt: skip
def test_every_call_is_known_by_its_level(solver: Solver, steps: list[int]) -> None:
    calls, _ = sampled(solver)
    assert [call.step for call in calls] == steps
    assert [call.number for call in calls] == list(range(len(steps)))
    for call in calls:
        assert call.levels == LEVELS.tolist()


@pytest.mark.parametrize("solver", [euler, told_before])
def test_what_comes_next_is_not_asked_of_the_device(solver: Solver) -> None:
    """Once for the levels of the run; of the calls only until the sampler is seen to make one a step."""
    calls, reads = sampled(solver)
    assert reads <= 1 + 2 < 1 + len(calls)
    assert [call.level for call in calls] == LEVELS.tolist()[:-1]


def test_passes_of_one_call_are_asked_for_once() -> None:
    calls, reads = sampled(heun, passes=4)
    assert reads == 1 + len(calls)


def test_another_run_begins_anew() -> None:
    steps = SamplerSteps()
    for levels in (LEVELS, LEVELS.clone()):
        steps.begin()
        for index in range(3):
            assert steps.at(levels, levels[index : index + 1]).step == index
            steps.done(index)
    # other levels, as a sampler that begins again in its run has them
    assert steps.at(LEVELS.sqrt(), LEVELS.sqrt()[1:2]).step == 1
