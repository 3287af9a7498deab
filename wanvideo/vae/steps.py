"""Steps of time through strips: call by call, or as the device's work was recorded, where it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ...vae.recording import Recorder, Replays
from ...vae.strips import NUM_PAGES_AT_WORK
from .strip import NUM_FRAMES, Strip

NUM_CALLED = (
    2  # steps, of one frame and of several: the first work of its kind loads kernels, which is no work to record
)
PERIOD = math.lcm(NUM_FRAMES, NUM_PAGES_AT_WORK)  # after which steps are on the same memory again


class Steps:
    """What `make` makes of each step in each strip, which see the steps in order."""

    def __init__(self, make: Callable[[Tensor, Strip], Tensor], recorder: Recorder | None) -> None:
        self._make, self._replays, self._num_called = make, Replays(recorder), 0
        self._given: dict[Hashable, Tensor] = {}  # the places of what recorded steps are given
        self._made: dict[Hashable, Tensor] = {}  # and of what they make

    @torch.inference_mode()
    def made(self, given: Tensor, strip: Strip, step: int) -> Tensor:
        """`make(given, strip)`."""
        if step == 0:
            strip.begin()
        if self._num_called < NUM_CALLED or not self._replays.records:
            self._num_called += 1
            return self._make(given, strip)
        # the first frame is alone
        kind = strip.work, step > 0
        key = *kind, step % PERIOD
        place = self._given.get(kind)
        if place is None:
            place = self._given[kind] = given.clone()
        else:
            place.copy_(given, non_blocking=True)

        def work() -> None:
            self._made[key] = self._make(place, strip)

        self._replays.do(key, lambda: strip.from_here(work))
        return self._made[key].clone()  # the next step writes over it
