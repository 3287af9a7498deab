"""What a stopped run of FlashVSR keeps, as the next one reads it: damage is told, and goes on to no other video."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.upscale.kept_stream import KeptStream
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest
from lowvram_video.wanvideo.upscale.run import Upscaler
from lowvram_video.wanvideo.upscale.stream import UpscaleStream
from safetensors import SafetensorError
from torch import Tensor

from ..tiny_flashvsr import small_video
from . import mutations
from .reader import CPU, NonFinite, Reader

KEY = "a run's key"
SMALL = 64, 64
REQUEST = UpscaleRequest(seed=1, sparse_ratio=0.1, local_range=9, kept_windows=2)


class KeptUpscaling:
    """States of a video after two steps and after three, made once."""

    def __init__(self, files: UpscaleFiles, place: Path) -> None:
        self._files, self._place = files, place
        self._video = small_video(41, *SMALL)
        (place / "earlier").mkdir(parents=True)
        (place / "kept").mkdir()
        with torch.inference_mode(), self.opened() as stream:
            small = iter(self._video)
            for folder in (None, place / "earlier", place / "kept"):
                pictures = stream.step([next(small) for _ in range(stream.wanted)])
                if folder is not None:
                    KeptStream(folder, KEY).save(stream, pictures)
            self._wanted = list(_remembered(stream)), pictures

    @property
    def reader(self) -> Reader:
        return Reader(self._make, (self._take_up,))

    def _make(self, folder: Path, draw: random.Random) -> Path:
        """The later state with one file damaged, gone, or exchanged for another's or for that of the earlier one."""
        shutil.copytree(self._place / "kept", folder, dirs_exist_ok=True)
        (state,) = folder.glob("state_*")
        (earlier,) = (self._place / "earlier").glob("state_*")
        victim, kind = draw.choice(sorted(state.iterdir())), draw.randrange(8)
        if kind < 5:
            victim.write_bytes(mutations.safetensors(victim.read_bytes(), draw))
        elif kind == 5:
            shutil.copy(earlier / victim.name, victim)
        elif kind == 6:
            shutil.copy(draw.choice(sorted(state.iterdir())), folder / "exchanged")
            (folder / "exchanged").replace(victim)
        else:
            victim.unlink()
        return folder

    def _take_up(self, folder: Path) -> None:
        with torch.inference_mode(), self.opened() as stream:
            self.check(stream, folder)

    def opened(self) -> AbstractContextManager[UpscaleStream]:
        """A stream that may go on from what is kept."""
        return Upscaler(self._files, RunSettings(device=CPU)).opened(REQUEST, SMALL)

    def check(self, stream: UpscaleStream, folder: Path) -> None:
        """Have it go on, as the film does; what it takes is what was kept."""
        try:
            found = KeptStream(folder, KEY).restore(stream, iter(self._video))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder} is no use ({error})") from error
        remembered, pictures = self._wanted
        same = found is not None and found[1] is not None and torch.equal(found[1], pictures)
        if not same or not _equal(list(_remembered(stream)), remembered):
            raise NonFinite("another state was taken for the one that was kept")


def _remembered(stream: UpscaleStream) -> Iterator[Tensor]:
    yield torch.tensor([stream.num_steps, *stream.windows.windows])
    yield from (state.clone() for _, state in stream.windows.state())
    yield from (tensor.clone() for _, tensor in sorted(stream.tensors().items()))


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
