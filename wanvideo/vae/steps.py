"""Steps of time through strips: call by call, or as the device's work was recorded, where that is the same to the bit.

What a strip remembers lies at the same places in every third step, and in all strips of the same rows: so a strip's
first steps are recorded, and played again in the others of its kind. Recorded work knows nothing of Python: it could
lack something that was not done by the device, or be done amiss by a driver. So the first time that a process meets a
kind of strip, its first steps are done both ways, and what they make and what they leave in memory is compared. No
result is taken from a recording before that is the same to the bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from ...memory.plan.decode import PAGES_AT_WORK
from ...system.device_errors import is_out_of_memory
from ...vae.recording import Recorder, Work, fingerprint
from .strip import NUM_FRAMES, Strip

logger = logging.getLogger(__name__)

PERIOD = math.lcm(NUM_FRAMES, PAGES_AT_WORK)  # after which steps are on the same memory again
LEAST_REPLAYS = 2 * PERIOD  # that are worth recording

Make = Callable[[Tensor, Strip], Tensor]
Give = Callable[[int], Tensor]


@dataclass
class Recording:
    """The steps of one kind of strip: the first, which is alone, then those of a period, under their numbers.

    `places` are where they find what they are given, `made` what they made last.
    """

    places: dict[int, Tensor] = field(default_factory=dict)
    made: dict[int, Tensor] = field(default_factory=dict)
    plays: dict[int, Work] = field(default_factory=dict)

    def play(self, given: Tensor, step: int) -> Tensor:
        """What a step makes, until it is played again."""
        number = (step - 1) % PERIOD + 1 if step else 0
        self.places[number].copy_(given, non_blocking=True)
        self.plays[number]()
        return self.made[number]


class Steps:
    """What `make` makes of each step in each of some strips, which see `num_steps` of them in order."""

    def __init__(
        self, make: Make, strips: Sequence[Strip], num_steps: int, recorder: Recorder | None, proven: set[Hashable]
    ) -> None:
        """`proven` are the kinds of strips that were the same either way before; there will be more."""
        self._make, self._strips, self._num_steps = make, strips, num_steps
        self._recorder, self._proven = recorder, proven
        self._recordings: dict[Hashable, Recording] = {}

    def prepare(self, index: int, give: Give) -> None:
        """Record the steps of a strip that is about to be made, where it is the first of its kind and that pays.

        `give(step)` is what a step is given. It is asked for the first steps, some times over, and then again from the
        first on.
        """
        strip = self._strips[index]
        if self._recorder is None or strip.kind in self._recordings or not self._pays(index):
            return
        error = self._failure(self._recorder, strip, give)
        if error is not None and is_out_of_memory(error):
            # What the device did so far leaves its room only once it is waited for.
            self._recordings.clear()
            self._recorder.forget()
            error = self._failure(self._recorder, strip, give)
        if error is not None:
            self._stop(str(error))

    @torch.inference_mode()
    def made(self, given: Tensor, strip: Strip, step: int) -> Tensor:
        """`make(given, strip)`."""
        if step == 0:
            strip.begin()
        recording = self._recordings.get(strip.kind)
        return self._make(given, strip) if recording is None else recording.play(given, step).clone()

    def _pays(self, index: int) -> bool:
        kind = self._strips[index].kind
        alike = sum(1 for _ in takewhile(lambda strip: strip.kind == kind, self._strips[index:]))
        return self._num_steps > PERIOD and alike * self._num_steps - PERIOD - 1 >= LEAST_REPLAYS

    def _failure(self, recorder: Recorder, strip: Strip, give: Give) -> RuntimeError | None:
        """Record the steps of a strip, or say why that failed."""
        try:
            self._record(recorder, strip, give)
        except RuntimeError as error:
            return error.with_traceback(None)  # which would hold memory
        return None

    @torch.inference_mode()
    def _record(self, recorder: Recorder, strip: Strip, give: Give) -> None:
        if strip.kind in self._proven:
            self._recordings[strip.kind] = self._recorded(recorder, strip, give)
            return
        self._recordings.clear()  # whose memory calls need now
        recorder.forget()
        strip.begin()
        called = self._prints(strip, lambda step: self._make(give(step), strip))
        recorder.forget()
        recording = self._recorded(recorder, strip, give)
        strip.begin()
        played = self._prints(strip, lambda step: recording.play(give(step), step))
        if not torch.equal(called, played):
            self._stop("played back they are not what they were")
            return
        self._proven.add(strip.kind)
        self._recordings[strip.kind] = recording

    def _recorded(self, recorder: Recorder, strip: Strip, give: Give) -> Recording:
        recording = Recording()
        strip.begin()
        for step in range(PERIOD + 1):
            given = give(step)
            # all but the first are given the same shape, and only one is at work
            place = recording.places[step] = recording.places[1] if step > 1 else given.clone()

            def work(step: int = step, place: Tensor = place) -> None:
                recording.made[step] = self._make(place, strip)

            recording.plays[step] = recorder.record(work)
        return recording

    def _prints(self, strip: Strip, make: Callable[[int], Tensor]) -> Tensor:
        """A fingerprint of what the first steps make, and of what they leave to each other and to the strip below."""
        prints = [fingerprint([make(step), *strip.left]) for step in range(PERIOD + 1)]
        return torch.cat([*prints, fingerprint([strip.remembered])])

    def _stop(self, reason: str) -> None:
        """Have all further steps done call by call."""
        logger.warning("steps of the VAE are done call by call, as they cannot be recorded here: %s", reason)
        self._recordings.clear()
        if self._recorder is not None:
            self._recorder.forget()
        self._recorder = None
