"""A stream on the disk: what it remembers, layer by layer, so that a run that was stopped goes on bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ...system.atomic_files import write_file
from ...system.bounded_json import parse_json, read_json_object
from ...system.sizes import in_gib
from ...video.growing_video import GrowingVideo
from ...weights.files.records import read_record
from .host_windows import FIRST_WINDOWS
from .stream import UpscaleStream

STATE = re.compile(r"state_(\d{8})")
OPEN = "open_frames"
MOST_NOTE_BYTES = 1 << 12
MOST_STEPS = 1 << 32  # of 8 frames
BYTES_PER_SECOND = 16 << 20  # of states, at most: 58 GB an hour, which is nothing to a disk, and its wear
MOST_OF_TIME = 0.05  # that they may take of a run


class KeptStream:
    """States in `folder`, of which the last one counts; `key` is the run's."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self._sound: Path | None = None  # the state that this process has written, or has gone on from
        self._ended, self._took = time.monotonic(), 0.0  # of the last writing, done or not: when, and seconds

    def is_due(self, stream: UpscaleStream) -> bool:
        """Whether a state is worth its writing by now: the larger it is, the longer a run goes on before."""
        wait = max(_state_bytes(stream, None) / BYTES_PER_SECOND, self._took / MOST_OF_TIME)
        return time.monotonic() - self._ended > wait

    def check_room(self, stream: UpscaleStream, open_frames: Tensor | None = None) -> None:
        """OSError where the disk has no room for a state beside what is there."""
        wanted, free = _state_bytes(stream, open_frames), shutil.disk_usage(self.folder).free
        if wanted > free:
            raise OSError(
                f"it takes {in_gib(wanted)}, and {in_gib(free)} of the disk are free: free some of it, or a stop loses "
                "what was made",
            )

    def save(self, stream: UpscaleStream, open_frames: Tensor | None) -> None:
        """Keep what the stream remembers, and frames uint8 that are in no video yet. OSError as the system's.

        Nothing is written where that is kept already, as after a stop that follows at once.
        """
        place = self.folder / f"state_{stream.num_steps:08d}"
        if place == self._sound and place.exists():
            return
        began = time.monotonic()
        try:
            self.check_room(stream, open_frames)
            self._save(place, stream, open_frames)
        finally:
            self._ended = time.monotonic()
            self._took = self._ended - began
        self._sound = place

    def _save(self, place: Path, stream: UpscaleStream, open_frames: Tensor | None) -> None:
        unfinished = place.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        windows = stream.windows.windows
        tensors = {**stream.tensors(), **({} if open_frames is None else {OPEN: open_frames})}
        told = {"num_steps": stream.num_steps, "windows": [windows.start, windows.stop]}
        try:
            for layer, state in stream.windows.state():
                self._write(unfinished / _layer_name(layer), {"windows": state}, _layer_said(layer, stream.num_steps))
            self._write(unfinished / "stream.safetensors", tensors, json.dumps(told))
            if place.exists():
                shutil.rmtree(place)
            unfinished.rename(place)
        except BaseException:  # gigabytes, on a disk that may be full
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self.forget(but=place)

    def restore(self, stream: UpscaleStream, small: Iterator[Tensor]) -> tuple[Tensor, Tensor | None] | None:
        """Have the stream be as it was kept: the small frame that it has taken last, and the frames in no video yet.

        `small` are all frames of the video, from the first on; those that it took are gone afterwards. None where
        nothing was kept. OSError, ValueError or KeyError where that is no use: the stream is to be begun anew.
        """
        places = sorted(path for path in self.folder.iterdir() if STATE.fullmatch(path.name))
        if not places:
            return None
        tensors, said = self._read(places[-1] / "stream.safetensors")
        num_steps, windows = _told(said)
        all_layers = range(stream.windows.size.num_layers)
        layers = ((layer, self._windows(places[-1], layer, num_steps)) for layer in all_layers)
        stream.windows.restore(windows, layers)
        open_frames = tensors.pop(OPEN, None)
        last = stream.take_up(num_steps, tensors, small)
        self._sound = places[-1]
        return last, open_frames

    def note_whole(self, film: GrowingVideo) -> None:
        """The film has all its frames: nothing of the stream is wanted any more."""
        with suppress(OSError):  # else it is made again where what follows fails
            write_file(self._whole, json.dumps({"key": self._key, "num_frames": film.num_frames}).encode())

    def has_whole(self, film: GrowingVideo) -> bool:
        """Whether that was noted, and the video still shows all of it."""
        try:
            told = read_json_object(self._whole, MOST_NOTE_BYTES)
            whole = told["key"] == self._key and told["num_frames"] == film.num_frames == film.num_shown
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return whole and GrowingVideo.is_at(film.folder, film.video)

    @property
    def _whole(self) -> Path:
        return self.folder / "whole.json"

    def forget(self, but: Path | None = None) -> None:
        """Remove what was kept."""
        for path in self.folder.iterdir():
            if path.name.startswith("state_") and path != but:
                shutil.rmtree(path, ignore_errors=True)

    def _windows(self, place: Path, layer: int, num_steps: int) -> Tensor:
        tensors, said = self._read(place / _layer_name(layer))
        if said != _layer_said(layer, num_steps):
            raise ValueError(f"{place / _layer_name(layer)} is of another layer or step")
        return tensors["windows"]

    def _write(self, path: Path, tensors: dict[str, Tensor], said: str) -> None:
        write_signed(path, tensors, {"key": self._key, "said": said})

    def _read(self, path: Path) -> tuple[dict[str, Tensor], str]:
        tensors, metadata = read_record(path)
        if metadata.get("key") != self._key:
            raise ValueError(f"{path} is of another run")
        said = metadata.get("said", "")
        if metadata.get("checksum") != _checksum(tensors, said):
            raise ValueError(f"{path} is damaged")
        return tensors, said


def write_signed(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file of a state: tensors, and texts "key" and "said", with a checksum of all that counts. OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(tensors, {**metadata, "checksum": _checksum(tensors, metadata["said"])}))


def _told(said: str) -> tuple[int, range]:
    """How many steps a state is of, and which windows are kept after them. ValueError for what no stream has said."""
    told = parse_json(said, MOST_NOTE_BYTES)
    (first, stop), num_steps = told["windows"], told["num_steps"]
    if not all(isinstance(each, int) for each in (first, stop, num_steps)):
        raise ValueError("its steps or windows are no whole numbers")
    if not (0 <= first < stop == num_steps + FIRST_WINDOWS - 1 and 1 <= num_steps <= MOST_STEPS):
        raise ValueError(f"windows {first} to {stop} are not those of {num_steps} steps")
    return num_steps, range(first, stop)


def _state_bytes(stream: UpscaleStream, open_frames: Tensor | None) -> int:
    """What a state takes on the disk, once all windows are there that are kept."""
    tensors = [*stream.tensors().values(), *([] if open_frames is None else [open_frames])]
    return stream.windows.size.kept_bytes + sum(tensor.nbytes for tensor in tensors)


def _layer_name(layer: int) -> str:
    return f"layer_{layer:03d}.safetensors"


def _layer_said(layer: int, num_steps: int) -> str:
    return f"layer {layer} after {num_steps} steps"


def _checksum(tensors: dict[str, Tensor], said: str) -> str:
    total = zlib.crc32(said.encode(errors="replace"))
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(errors="replace"), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
