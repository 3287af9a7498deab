"""Whether what a decoder makes of sound latents are numbers, told rather than shown as a black video."""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor

from ..system.dtypes import FP16_ENDS
from .checks import VaeConfig
from .outbox import Finish


class BadFrames(ValueError):
    """Decoded frames hold NaN or infinite numbers: they would be black."""


class Decoder(Protocol):
    """What is watched."""

    @property
    def config(self) -> VaeConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...


class FrameWatch:
    """Told of the frames that a decoder makes, which may be black or all alike, but are numbers: else `end` raises.

    Nobody waits for the device before that.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._seen: dict[torch.device, tuple[Tensor, Tensor]] = {}  # the least and the largest: NaN where there is one
        self._alone = threading.Lock()

    @torch.inference_mode()
    def see(self, frames: Tensor) -> None:
        """Any part of the video, on the device that made it; any thread's."""
        look = torch.aminmax(frames)
        with self._alone:
            # In place: what stayed of each part would lie between the parts' own memory, and so keep that.
            least, most = self._seen.setdefault(frames.device, (look.min, look.max))
            torch.minimum(least, look.min, out=least)
            torch.maximum(most, look.max, out=most)

    def over(self, finish: Finish) -> Finish:
        """The same for pieces, which are seen first."""

        def seen(piece: Tensor) -> Tensor:
            self.see(piece)
            return finish(piece)

        return seen

    def end(self) -> None:
        """Judge all that was seen. BadFrames, with what is likely wrong."""
        if all(bool(torch.stack(seen).isfinite().all()) for seen in self._seen.values()):
            return
        config = self._decoder.config
        cause = f"{FP16_ENDS}, or " if self._decoder.dtype == torch.float16 else ""
        raise BadFrames(
            f"{config.name}: decoded frames have NaN or infinite numbers: likely {cause}damaged weights (download "
            f"{config.file_name} again)"
        )


def watched(decoder: Decoder, frames: Tensor) -> Tensor:
    """All frames that a decoder made. BadFrames."""
    watch = FrameWatch(decoder)
    watch.see(frames)
    watch.end()
    return frames
