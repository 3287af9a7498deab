"""A FramePack model under ComfyUI's memory management."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...framepack.footprint import SectionSize
from ...framepack.streamed import StreamedFramePack
from ...memory.plan.footprint import WorkSize
from ...runtime.settings import RunSettings
from ...runtime.turns import Turns
from . import host
from .engine import Engine


class SectionModel(Protocol):
    """The section that is sampled now."""

    def velocity(self, x: Tensor, prompt: Tensor, options: dict[str, Any]) -> Tensor:
        """`[B, 16, T, h, w]`, each sample by the prompt of its number."""
        ...


class FramePackEngine(Engine[StreamedFramePack]):
    """Planned for a section; on the device from its first pass until something else wants the room."""

    plan_note = "FramePack makes a video section by section: its length does not matter to this plan, which is for one."

    def __init__(self, path: Path, settings: RunSettings, model_type: str, turns: Turns | None = None):
        super().__init__(partial(StreamedFramePack, model_type=model_type), path, settings, turns)
        self.section: SectionModel | None = None  # what core's guider samples now

    def begin_run(self, phase: str | None = "denoise") -> None:
        """A guider that samples one of a run's sections begins none of its own."""
        if self.section is None:
            super().begin_run(phase)

    def end_run(self) -> None:
        if self.section is None:
            super().end_run()

    def video_work(self, width: int, height: int, frames: int, passes_per_step: int) -> WorkSize:
        """A section of the usual length: that of the video does not matter."""
        return SectionSize(4 * 9 - 3, height, width, passes_per_step=passes_per_step)

    def check_latent(self, latent: Tensor) -> None:
        if self.section is not None:
            return
        raise ValueError(
            "FramePack makes a video section by section, which ComfyUI's samplers cannot do: connect this model to "
            "FramePack Sampler (Low VRAM)"
        )

    def leave_device(self) -> None:
        """Free device memory, for a decoding between sections; the weights stay in host memory as they are."""
        self.streamed.stop()
        self._tell_owner()
        # others count against a budget, also where no section is made any more
        self.evict_others() if self.options.vram_budget_gb else host.empty_cache()
