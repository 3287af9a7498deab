"""Whether a run's latents are any use, seen while it goes on rather than in a black video."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque

import torch
from torch import Tensor

from .host_copies import HostCopy

logger = logging.getLogger(__name__)

MOST = 1e4  # a latent's values are around 1; guidance of 30 makes tens of them
LEAST = 1e-2  # of a video's standard deviation, which is around 1, of a black one too: its channels differ
SLOW = 3.0  # times the steps before, and twice in a row
SHORTEST_SECONDS = 1.0  # of a step that is compared: recorded ones take none


class BadLatents(ValueError):
    """A model's latents hold no numbers, are out of all bounds or all alike: what follows would be black or grey.

    `step` is the first that is no use, counted from 0; `num_kept` answers of the model before it are on the disk.
    """

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step, self.num_kept = step, 0


class LatentWatch:
    """Told of every step of one run; `cause` are words on what is likely wrong if its latents are.

    A step's latents are looked at when the device has made them, so that nobody waits for it; the last ones at the
    end, where they are waited for anyway. BadLatents from `step`. Steps that become much slower are logged once.
    """

    def __init__(self, cause: str) -> None:
        self._cause = cause
        self._looks: deque[tuple[int, HostCopy]] = deque()  # that the device has not made yet
        self._then = time.monotonic()
        self._seconds: list[float] = []
        self._num_slow = 0

    def step(self, index: int, num_steps: int, denoised: Tensor, latent: Tensor) -> None:
        """Step `index` is done: the clean latent that it guessed, and the latent after it (or, in ComfyUI, before)."""
        self._time()
        last = index == num_steps - 1
        while self._looks and (last or self._looks[0][1].there):
            seen, look = self._looks.popleft()
            self._judge(look, seen, num_steps)
        look = _look([denoised, latent] if last else [denoised])
        if last:
            self._judge(look, index, num_steps)
        else:
            self._looks.append((index, look))

    def _judge(self, look: HostCopy, index: int, num_steps: int) -> None:
        finite, most, deviation = look.wait()["look"].tolist()
        if finite and most <= MOST and deviation >= LEAST:
            return
        what = "have NaN or infinite numbers"
        if finite:
            what = f"have values up to {most:.3g}, where some units are usual"
            if most <= MOST:
                what = f"are all alike (a standard deviation of {deviation:.2g}, where about 1 is usual)"
        names = {0: "its first step", num_steps - 1: "its last step"}
        after = names.get(index, f"step {index + 1} of {num_steps}")
        raise BadLatents(f"the model's latents {what} after {after}: likely {self._cause}", index)

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


def _look(latents: list[Tensor]) -> HostCopy:
    """Whether all is finite, the largest value and the least deviation of a video, on their way to the host."""
    seen = []
    for latent in latents:
        videos = latent.detach().float().flatten(1)
        deviation = videos.std(dim=1, unbiased=False).amin()
        seen.append(torch.stack([videos.isfinite().all().float(), videos.abs().amax(), deviation]))
    finite, most, deviation = torch.stack(seen).unbind(1)
    return HostCopy({"look": torch.stack([finite.amin(), most.amax(), deviation.amin()])})
