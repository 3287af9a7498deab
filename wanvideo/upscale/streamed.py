"""FlashVSR's transformer with streamed blocks, and what its passes take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...attention.masked import MASK_BLOCK
from ...memory.plan.footprint import Choice, Limits, ModelFootprint, WorkSize
from ...memory.stream.pinned import Registrar
from ...runtime.settings import RunSettings
from ...vae.tiny import TinyConfig
from ...weights.files.checkpoint import Checkpoint
from ...weights.linear.adopt import adopt_tensors
from ...weights.lora.file import LoraChoice
from ..footprint import WanFootprint, WanWork, wan_work
from ..network.config import WanConfig
from ..network.upscaling import UpscalingModel, WindowExtras
from ..network.windows import HEADS
from ..streamed import StreamedWan
from .decoder import decode_bytes, memory_bytes
from .host_windows import WindowSize
from .projection import ProjectionConfig

FIRST_FRAMES = 21  # that the first pass makes: six latent frames
NEXT_FRAMES = 8
AHEAD = 4  # frames that a pass sees beyond those that it makes
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by their size, for sizes


@dataclass(frozen=True)
class UpscaleWork(WanWork):
    """The first pass of a video, which is the largest."""

    def advice(self, frames: int) -> str:
        """Of any length passes are as large."""
        return "upscale less, or a smaller video"


@dataclass(frozen=True)
class UpscaleFootprint(WanFootprint):
    """`projection` and `decoder` work between passes, `kept_windows` are remembered.

    `parks_memory`: what decoder and projection remember is in RAM. `windows_on_disk`: what the transformer does is not.
    """

    projection: ProjectionConfig = ProjectionConfig()  # noqa: RUF009 - immutable
    decoder: TinyConfig = TinyConfig("", "", "", 0)  # noqa: RUF009 - immutable
    kept_windows: int = 3
    parks_memory: bool = False
    windows_on_disk: bool = False

    def window_size(self, work: WorkSize) -> WindowSize:
        """What is remembered of each window."""
        rows = 2 * work.tokens // work.latent_size[0]  # of two latent frames
        return WindowSize(self.num_blocks, rows, self.dim, DTYPES[self.compute_bytes], self.kept_windows)

    def remembered_bytes(self, work: WorkSize) -> int:
        """What a run remembers in RAM."""
        # of this step and of the one before, which a step that failed begins with again
        size = work.height, work.width, self.compute_bytes
        parked = 2 * (memory_bytes(self.decoder, *size) + self.projection.seen_bytes(*size)) * self.parks_memory
        return parked if self.windows_on_disk else self.window_size(work).host_bytes + parked

    def activation_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """The most of a pass, of the projection and of the decoder, which take turns, and what was seen last."""
        work = replace(work, frames=FIRST_FRAMES)  # a video of any length has such a pass
        element, size = self.compute_bytes, (work.height, work.width)
        windows = self.window_size(work)
        later = replace(work, frames=NEXT_FRAMES - 3)  # two latent frames
        first_pass = self.pass_bytes(work, choice, limits) + windows.device_bytes(first=True)
        later_pass = self.pass_bytes(later, choice, limits) + windows.device_bytes(first=False)
        remembered = 0 if self.parks_memory else memory_bytes(self.decoder, *size, element)
        clip_rows = work.rows // work.latent_size[0]
        added = self.projection.num_layers * (work.rows + clip_rows) * self.dim * element
        # what the projection saw last: of this step, and of the one before until it is done; one more while it works
        one_seen = self.projection.seen_bytes(*size, element)
        seen = 0 if self.parks_memory else 2 * one_seen
        projecting = self.projection.clip_bytes(*size, element) + added + one_seen
        return seen + max(first_pass, remembered + max(later_pass, projecting), self.decode_bytes(work))

    def decode_bytes(self, work: WorkSize) -> int:
        """The most while frames are decoded, and coloured one after the other."""
        size = work.height, work.width
        one_frame = 6 * 4 * 3 * work.height * work.width  # in fp32, as it is enlarged or coloured
        # what was remembered before a step is kept for another try
        remembered = 0 if self.parks_memory else 2 * memory_bytes(self.decoder, *size, self.compute_bytes)
        return remembered + decode_bytes(self.decoder, *size, self.compute_bytes) + one_frame

    def key_length(self, work: WorkSize) -> int:
        """Beside a pass's own there are those of windows before it."""
        return 0

    def room_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """Its first pass is larger than the others, which may have more beside it."""
        return 0

    def pass_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        added = self.projection.num_layers * work.rows * self.dim * self.compute_bytes
        windows = self.window_size(work)
        blocks, num_windows = work.tokens // MASK_BLOCK, work.latent_size[0] // 2
        seen = blocks // num_windows * max(num_windows, windows.most + 1)
        scores = (6 * 4 * min(HEADS, self.num_heads) + self.num_heads) * blocks * seen
        return super().activation_bytes(work, choice, limits) + added + scores


class StreamedUpscaler(StreamedWan):
    """A FlashVSR transformer; `projection` and `decoder` are what else its runs need room for."""

    def __init__(
        self,
        path: Path,
        settings: RunSettings,
        registrar: Registrar | None,
        between_blocks: Callable[[], None] | None,
        projection: ProjectionConfig,
        decoder: TinyConfig,
        loras: Sequence[LoraChoice] = (),
    ):
        if settings.sparse is not None:
            raise ValueError("FlashVSR's attention is sparse in its own way: leave `sparse` out, see `sparse_ratio`")
        if settings.others:
            raise ValueError("FlashVSR runs on one card: give one device")
        self._projection, self._decoder = projection, decoder
        self.kept_windows, self.parks_memory, self.windows_on_disk = 3, False, False
        self.beside_bytes = 0  # weights of the two
        super().__init__(path, settings, registrar, between_blocks, loras)
        # which blocks of keys count is chosen for all queries of a window together
        self.model.execution = replace(self.model.execution, all_queries=True, watch=None)

    def build(self, checkpoint: Checkpoint) -> UpscalingModel:
        network = UpscalingModel(self.config, device="meta")
        return adopt_tensors(network, checkpoint, "FlashVSR's transformer", "FlashVSR's Wan 2.1 T2V 1.3B file")

    def begun_again(
        self, begin: Callable[[], None], latent: Tensor, timestep: Tensor, text: Tensor, extras: WindowExtras
    ) -> Tensor:
        """The velocity of a pass; `begin` comes before it, and again where it is repeated with a leaner plan."""

        def run() -> Tensor:
            if not self.started:  # it had left to make room
                assert self.plan is not None
                self.start(self.plan)
            begin()
            return self.model(latent, timestep, self.context(text, None), extras=extras)

        return self.retrying(run)

    def footprint(self, dtype: torch.dtype | None = None) -> ModelFootprint:
        """See `StreamedWan`."""
        plain = super().footprint(dtype)
        return UpscaleFootprint(
            **{
                **vars(plain),
                "fixed_bytes": plain.fixed_bytes + self.beside_bytes,
                "streams_queries": False,
                "packs_keys": False,
                "copies_rows": False,
                "vae": None,
            },
            projection=self._projection,
            decoder=self._decoder,
            kept_windows=self.kept_windows,
            parks_memory=self.parks_memory,
            windows_on_disk=self.windows_on_disk,
        )


def upscale_work(config: WanConfig, width: int, height: int) -> UpscaleWork:
    """The work of a video that is made in this size, sides padded."""
    return UpscaleWork(**vars(wan_work(config, (width, height, FIRST_FRAMES))))
