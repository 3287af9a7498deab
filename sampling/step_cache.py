"""TeaCache: a step whose input has hardly changed reuses what the blocks added at the last computed one.

Liu et al. 2024 (arXiv:2411.19108). The change of the first block's modulated input, relative L1 between consecutive
steps, is turned by a fitted polynomial into an estimate of the change of the output; those add up until they reach the
threshold, and then a step is computed. Polynomial, signal and thresholds: lllyasviel/FramePack
`diffusers_helper/models/hunyuan_video_packed.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Highest power first.
FRAMEPACK_POLYNOMIAL = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
FRAMEPACK_THRESHOLD = 0.15
# 2048 rows of 3072 columns are 24 MiB in float32, instead of 215 MiB for a whole FramePack sequence.
ROWS_AT_ONCE = 2048


class TeaCache:
    """Decides which passes of one prompt are computed, and keeps what the last computed one added (`BlockCache`).

    cond and uncond need an object each: their signals and residuals differ. The first and the last of `num_steps`
    passes are always computed. Call `begin_section()` before every section and after the last, `begin_step()` before
    every pass. A model asks `reuse(signal)` in a pass; if that is False it computes and assigns `residual`, otherwise
    it adds `residual`. However often a step is run (out of memory, a solver that calls again), it is decided once.

    Holds one signal and one residual on the device, in the dtypes they come in, until `begin_section()`.
    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        num_steps: int,
        threshold: float = FRAMEPACK_THRESHOLD,
        polynomial: Sequence[float] = FRAMEPACK_POLYNOMIAL,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; expected the number of steps of a section, at least 1.")
        if not (math.isfinite(threshold) and threshold >= 0.0):
            raise ValueError(
                f"The TeaCache threshold is {threshold}; expected 0 (compute every step) or more, 0.15 is usual."
            )
        self.num_steps = num_steps
        self.threshold = threshold
        self.polynomial = tuple(polynomial)
        self.begin_section()

    def begin_section(self) -> None:
        """Forget everything: the next pass is the first of a section."""
        self.residual: Tensor | None = None  # what the blocks added at the last computed pass, [noisy rows, dim]
        self._step = 0
        self._decided: int | None = None  # the step that `_reused` is of
        self._reused = False
        self._change = 0.0  # estimated change of the output since the last computed pass
        self._signal: Tensor | None = None

    def begin_step(self, step: int) -> None:
        """The next pass is of this step, counted from 0; perhaps once more."""
        self._step = step

    def reuse(self, signal: Tensor) -> bool:
        """Tell whether this pass may add `residual` instead of running the blocks.

        `signal` is the first block's modulated input over the whole packed sequence, [rows, dim], any float dtype; it
        is copied, so the model may overwrite it. Reads one number back from the device.
        """
        if self._step == self._decided:
            return self._reused
        change = math.inf
        known = self._signal is not None and self._signal.shape == signal.shape and self.residual is not None
        if known and 0 < self._step < self.num_steps - 1:
            assert self._signal is not None
            change = self._change + self._estimate(relative_l1(signal, self._signal))
        reuse = change < self.threshold  # not a number compares False, and is computed
        self._keep(signal)
        self._decided, self._reused, self._change = self._step, reuse, change if reuse else 0.0
        return reuse

    def _estimate(self, change: float) -> float:
        value = 0.0
        for coefficient in self.polynomial:
            value = value * change + coefficient
        return value

    def _keep(self, signal: Tensor) -> None:
        held = self._signal
        if held is None or held.shape != signal.shape or held.dtype != signal.dtype or held.device != signal.device:
            self._signal = signal.clone()
        else:
            held.copy_(signal)


def relative_l1(signal: Tensor, previous: Tensor) -> float:
    """Return mean |signal - previous| / mean |previous|, summed in float32; both are [rows, dim].

    Works through the rows in chunks, adds up on the device and waits for it once.
    """
    sums = torch.zeros(2, dtype=torch.float32, device=signal.device)
    for now, before in zip(signal.split(ROWS_AT_ONCE), previous.split(ROWS_AT_ONCE), strict=True):
        # A difference in bfloat16 would round away most of what is measured here.
        change = now.to(torch.float32, copy=True).sub_(before)
        sums[0] += torch.linalg.vector_norm(change, ord=1)
        sums[1] += torch.linalg.vector_norm(before, ord=1, dtype=torch.float32)
    return float((sums[0] / sums[1]).item())
