"""TeaCache as FramePack has it: a step whose input has hardly changed reuses what the blocks added before.

The signal is the first block's modulated input over the whole packed sequence. Polynomial, signal and thresholds:
lllyasviel/FramePack `diffusers_helper/models/hunyuan_video_packed.py`.
"""

from __future__ import annotations

import math

from .pass_cache import PassCache
from .rules import TeaRule

# Highest power first.
FRAMEPACK_POLYNOMIAL = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
FRAMEPACK_THRESHOLD = 0.15


class TeaCache(PassCache):
    """Decides which passes of one prompt of a section are computed (see `PassCache`).

    The first and the last of `num_steps` passes always are. Call `begin_section()` before every section and after the
    last, `begin_step()` before every pass. Holds one signal and one residual on the device, in the dtypes they come in,
    until `begin_section()`. Raises ValueError for values out of range.
    """

    def __init__(self, num_steps: int, threshold: float = FRAMEPACK_THRESHOLD) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; expected the number of steps of a section, at least 1.")
        if not (math.isfinite(threshold) and threshold >= 0.0):
            raise ValueError(
                f"The TeaCache threshold is {threshold}; expected 0 (compute every step) or more, 0.15 is usual."
            )
        self.num_steps = num_steps
        super().__init__(TeaRule(FRAMEPACK_POLYNOMIAL), threshold)

    def begin_section(self) -> None:
        """Forget everything: the next pass is the first of a section."""
        self.reset()

    def begin_step(self, step: int) -> None:
        """The next pass is of this step, counted from 0; perhaps once more."""
        self.begin(step, allowed=0 < step < self.num_steps - 1)
