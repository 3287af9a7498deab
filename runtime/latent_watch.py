"""Whether a run's latents are any use, seen after its first step and at its end rather than in a black video."""

from __future__ import annotations

import logging
import math
import statistics
import time

import torch
from torch import Tensor

from .host_copies import HostCopy

logger = logging.getLogger(__name__)

MOST = 1e4  # a latent's values are around 1; guidance of 30 makes tens of them
SLOW = 3.0  # times the steps before, and twice in a row
SHORTEST_SECONDS = 1.0  # of a step that is compared: recorded ones take none


class BadLatents(ValueError):
    """A model's latents hold no numbers, or are out of all bounds: what follows would be black."""


class LatentWatch:
    """Told of every step of one run; `cause` are words on what is likely wrong if its latents are.

    The first step's latents are looked at when the device has made them, so that nobody waits for it; the last ones at
    the end, where they are waited for anyway. BadLatents from `step`. Steps that become much slower are logged once.
    """

    def __init__(self, cause: str) -> None:
        self._cause = cause
        self._first: HostCopy | None = None
        self._then = time.monotonic()
        self._seconds: list[float] = []
        self._num_slow = 0

    def step(self, index: int, num_steps: int, denoised: Tensor, latent: Tensor) -> None:
        """Step `index` is done: the clean latent that it guessed, and the latent after it."""
        self._time()
        last = index == num_steps - 1
        first = self._first
        if first is not None and (last or first.there):
            self._first = None
            self._judge(first, "its first step")
        if last:
            self._judge(_look(latent), "its last step")
        elif index == 0:
            self._first = _look(denoised)

    def _judge(self, look: HostCopy, step: str) -> None:
        finite, most = look.wait()["look"].tolist()
        if finite and most <= MOST:
            return
        what = f"values up to {most:.3g}, where some units are usual" if finite else "NaN or infinite numbers"
        raise BadLatents(f"the model's latents have {what} after {step}: likely {self._cause}")

    def _time(self) -> None:
        now = time.monotonic()
        seconds, self._then = now - self._then, now
        if seconds < SHORTEST_SECONDS:
            return
        usual = statistics.median(self._seconds) if len(self._seconds) >= 2 else math.inf
        self._num_slow = self._num_slow + 1 if seconds > SLOW * usual else 0
        if self._num_slow == 2:
            logger.warning(
                "steps take %.0f s, and %.0f s before: the GPU's memory may be full, so that its driver keeps some in "
                "RAM (Windows: CUDA - Sysmem Fallback Policy), or it is too hot: close other programs, or give a "
                "smaller VRAM budget",
                seconds,
                usual,
            )
        if not self._num_slow:
            self._seconds.append(seconds)


def _look(latent: Tensor) -> HostCopy:
    """Whether all is finite, and the largest value, on their way to the host."""
    values = latent.detach().float()
    return HostCopy({"look": torch.stack([values.isfinite().all().float(), values.abs().amax()])})
