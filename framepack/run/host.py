"""What a run asks of the program around it: the command line or ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...memory.plan.footprint import WorkSize
from ...memory.plan.plan import MemoryPlan
from ...sampling.solver import StepInfo
from ...video.growing_video import Grows
from ..section_work import Guide
from ..sections import Section
from ..streamed import StreamedFramePack
from ..vae.decoding import DecodeBudget
from ..vae.model import HunyuanVAE


class Output(Protocol):
    """What becomes of the frames: a `GrowingVideo`, or a picture."""

    @property
    def num_sections(self) -> int: ...
    def add(self, frames: Tensor, overlap: int) -> None: ...
    def begin(self, pieces: Iterable[Tensor], still_open: int) -> None: ...
    def leave(self) -> None: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class RunPlaces:
    """Where things are: the folder that keeps runs (None: nothing is kept, and there is a place for a while in
    `scratch`), and what opens the output in a folder of its own (None: latents are all that is wanted).

    `given` reads the video that is extended, uint8 `[T, H, W, 3]` piece by piece, where it is more than its latents.
    """

    runs: Path | None
    scratch: Path
    output: Callable[[Path, Grows], Output] | None
    given: Callable[[], Iterable[Tensor]] | None = None


class RunHost(Protocol):
    """The model with its memory, and the user with progress and interrupts."""

    @property
    def model(self) -> StreamedFramePack: ...

    @property
    def loras(self) -> tuple[Any, ...]:
        """What tells the LoRAs from others, as JSON values."""

    @property
    def guide(self) -> Guide:
        """Who guides the sections: FramePack itself, or nodes that were put before it."""

    def running(self, num_steps: int) -> AbstractContextManager[None]:
        """The whole run goes in here; so many steps are to be made."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Work of one kind: "prepare", "denoise" or "decode". Memory comes back where it fails."""

    def within_budget(self) -> AbstractContextManager[None]:
        """Device work that a plan was made for."""

    def make_plan(self, work: WorkSize) -> MemoryPlan:
        """The plan for this work as memory is now, the room for it made. PlanError says what would fit."""

    def start(self, plan: MemoryPlan) -> None:
        """Have the model on the device; with a leaner plan where it runs out of memory meanwhile."""

    def free_memory(self) -> None:
        """Give back all device memory that nothing works with: it ran out."""

    def decoder(self, latents: Tensor) -> AbstractContextManager[tuple[HunyuanVAE, DecodeBudget | None]]:
        """The VAE on the device in the model's place, and what it may use beside its weights (None: any)."""

    def on_step(self, section: Section, step: StepInfo) -> None:
        """A step is done; may raise to stop."""

    def check_interrupt(self, done: int, total: int) -> None:
        """Raises where the user wants to stop."""
