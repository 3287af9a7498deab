"""One run whose steps are kept, and made once more on the safe path where they were no use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sampling.solver import Denoiser
from ..system.device_errors import is_out_of_memory
from .latent_watch import BadLatents
from .recalled_calls import RecalledCalls
from .step_record import StepRecord
from .streamed import StreamedModel

logger = logging.getLogger(__name__)


class RecordedRun:
    """A run of these models in a folder of `root` (None: nothing is kept), held while the context lasts.

    `settings` says all that the latents depend on: it is asked again when the models have taken the safe path, for what
    computes otherwise is another run.
    """

    def __init__(
        self, root: Path | None, models: Sequence[StreamedModel[Any]], settings: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._root, self._models, self._settings = root, models, settings
        self.record: StepRecord | None = None
        self._unsound: StepRecord | None = None  # the run before it took the safe path
        self._num_steps = 0  # done in this process

    def __enter__(self) -> RecordedRun:
        self._open()
        if self.record is not None and self.record.is_unsound:
            self._take_safe_path()
        return self

    def __exit__(self, *_: object) -> None:
        for record in self._records:
            record.close()
        for model in self._models:  # the next run begins as its settings say
            model.leave_safe_path()

    @property
    def _records(self) -> list[StepRecord]:
        return [record for record in (self.record, self._unsound) if record is not None]

    def forget(self) -> None:
        """What was wanted is whole and in its place: nothing of the run need be kept."""
        for record in self._records:
            record.remove()

    def latent(self) -> Tensor | None:
        """That of a run whose steps are all made, in host memory."""
        kept = None if self.record is None else self.record.finished()
        return None if kept is None else kept["latent"]

    def finish(self, latent: Tensor) -> None:
        """Keep the latent in place of the steps."""
        if self.record is not None:
            self.record.finish(latent=latent)

    def end_step(self) -> None:
        """The solver has done a step."""
        self._num_steps += 1
        if self.record is not None:
            self.record.end_step()

    def recorded(self, denoise: Denoiser) -> Denoiser:
        """The same, with answers that are recorded where they are kept."""
        record = self.record
        if record is None:
            return denoise
        recalled = RecalledCalls(self._models)
        return lambda x, sigma: recalled.answers(record, x, sigma, lambda x: [denoise(x, sigma)])[0]

    def sound(self, denoise: Callable[[], Tensor]) -> Tensor:
        """The latent that `denoise` makes; once more on the safe path where it is no use, BadLatents where even so.

        Where there is no safer path only what is no use is made once more, by what is kept of the steps before.
        """
        try:
            return self._fitting(denoise)
        except BadLatents as error:
            if self._take_safe_path(error):
                execution = self._models[0].model.execution
                logger.warning("%s: the run begins anew with exact attention, in %s", error, execution.dtype)
            elif self._forget_bad(error):
                logger.warning("%s: the run goes on from the %d calls of the model before", error, error.num_kept)
            else:
                raise
        kept = self.latent()
        if kept is not None:
            return kept.to(self._models[0].settings.device)
        try:
            return self._fitting(denoise)
        except BadLatents as error:
            self._forget_bad(error)
            raise

    def _fitting(self, denoise: Callable[[], Tensor]) -> Tensor:
        """The latent; once more where the device ran out of memory between two passes, which no leaner plan is for.

        The steps that are kept are not made again; where none are, a run that has begun ends.
        """
        try:
            return denoise()
        except RuntimeError as error:
            if not is_out_of_memory(error) or (self.record is None and self._num_steps):
                raise
            logger.warning("out of VRAM between two passes: all of it is given back, and the run goes on")
        # outside the handler: its traceback holds tensors
        for model in self._models:
            model.stop()
        torch.cuda.empty_cache()
        if self.record is not None:
            self.record.rewind()
        return denoise()

    def _open(self) -> None:
        if self._root is not None:
            self.record = StepRecord.open(self._root, self._settings())

    def _take_safe_path(self, error: BadLatents | None = None) -> bool:
        """False where no path is safer."""
        if not any([model.take_safe_path() for model in self._models]):
            return False
        self._unsound = self.record
        if self._unsound is not None and error is not None:
            self._unsound.give_up(str(error))
        self._open()
        return True

    def _forget_bad(self, error: BadLatents) -> bool:
        """Whether something is kept of the steps before those that are no use, and nothing of these."""
        if self.record is not None:
            self.record.forget_step(error.step)
            error.num_kept = self.record.num_kept
        return error.num_kept > 0
