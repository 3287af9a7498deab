"""FlashVSR under ComfyUI: where its files are, what is to be enlarged, and a run beside other models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...memory.plan.limits import hold_allocator
from ...runtime.progress import Progress
from ...runtime.settings import RunSettings
from ...runtime.status_texts import PHASES
from ...video.reader import video_seconds
from ...video.writer import check_rate
from ...wanvideo.upscale.request import UpscaleFiles
from ...wanvideo.upscale.run import Upscaler
from ...wanvideo.upscale.source import Pictures, VideoFile, VideoSource
from . import host
from .saving import sound_of
from .status import teller

OWN_FOLDER = "FlashVSR"  # models/FlashVSR, where other packs have these files
FOLDERS = (host.MODEL_FOLDER, "vae")
FlashVSR = io.Custom("LOWVRAM_FLASHVSR")


@dataclass(frozen=True)
class FlashVSRModel:
    """What the loader gives: files and how they compute. Their weights are read when a video is enlarged, and leave."""

    files: UpscaleFiles
    settings: RunSettings
    version: str


def flashvsr_files() -> list[str]:
    """Names of files that may be FlashVSR's, in all places where people have them."""
    names = {name for folder in FOLDERS for name in host.model_files(folder)}
    own = host.models_folder() / OWN_FOLDER
    return sorted(names | {f"{OWN_FOLDER}/{path.name}" for path in own.glob("*.safetensors")})


def flashvsr_path(name: str) -> Path:
    """Where the file of this name is; ValueError where it is gone."""
    own = host.models_folder() / name
    if name.startswith(f"{OWN_FOLDER}/") and own.is_file():
        return own
    for folder in FOLDERS[1:]:
        if name in host.model_files(folder):
            return host.model_path(name, folder)
    return host.model_path(name)


def source_of(video: Any, images: Tensor | None, audio: Any, fps: float) -> VideoSource:
    """A VIDEO or an IMAGE as what is enlarged. ValueError unless there is just one of them.

    The file of a whole VIDEO is read as it is wanted; of others all frames are in RAM already.
    """
    if (video is None) == (images is None):
        raise ValueError("Upscale Video (Low VRAM) enlarges either a video or images: connect one of the two inputs")
    if images is not None:
        check_rate(fps)
        return Pictures(images, fps, sound_of(audio, 1, len(images) / fps)[0])
    file = _whole_file(video)
    if file is not None:
        return VideoFile(file)
    parts = video.get_components()
    rate = float(parts.frame_rate)
    return Pictures(parts.images, rate, sound_of(parts.audio, 1, len(parts.images) / rate)[0])


def _whole_file(video: Any) -> Path | None:
    """The file of a VIDEO that is all of one."""
    find = getattr(video, "get_stream_source", None)
    file = None if find is None else find()
    if not isinstance(file, str) or type(video).__name__ != "VideoFromFile":
        return None
    trimmed = getattr(video, "get_active_trim_window", None)
    if trimmed is not None:
        return Path(file) if not any(trimmed()) else None
    return Path(file) if abs(video.get_duration() - video_seconds(Path(file))) < 0.1 else None


class _BarProgress(Progress):
    """ComfyUI's progress bar and text of the node."""

    def __init__(self, total: int) -> None:
        self._bar = host.Progress(max(1, total))
        self._tell = teller()

    def begin(self, title: str) -> None:
        self._tell(PHASES.get(title, title))

    def update(self, done: int, total: int) -> None:
        self._bar.update(done, max(1, total))


@contextmanager
def upscaler_at_work(model: FlashVSRModel, num_frames: int) -> Iterator[Upscaler]:
    """The files opened, in the room that ComfyUI's other models leave for it; a limit ends with the run."""
    device = model.settings.device
    host.unload_others(None, device)
    progress = _BarProgress(num_frames)
    try:
        yield Upscaler(model.files, model.settings, progress, host.stop_if_interrupted, host.registrar(device))
    finally:
        if device.type == "cuda":
            hold_allocator(device, None)
        host.empty_cache()
