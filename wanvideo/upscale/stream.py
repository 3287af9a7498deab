"""One video on its way through FlashVSR, window by window; what it remembers is as large for any length.

Source: Zhuang et al. 2025 (arXiv:2510.12747); OpenImagingLab/FlashVSR, `diffsynth/pipelines/flashvsr_tiny_long.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from ...attention.masked import MaskedAttention
from ...runtime.latent_watch import LatentWatch
from ...vae.frame_watch import FrameWatch
from ...vae.retries import first_fitting
from ...vae.tiny import TinyVAE
from ..network.embeddings import AxisPositions
from ..network.upscaling import WindowExtras
from ..network.windows import WINDOW, WindowPass
from .decoder import FRAMES, decode_next
from .decoder_memory import DecoderMemory
from .frames import coloured, enlarged
from .host_windows import FIRST_WINDOWS, HostWindows
from .projection import CLIP, PIXELS, LowQualityProjection, Seen
from .request import UpscaleRequest, padded
from .streamed import AHEAD, FIRST_FRAMES, NEXT_FRAMES, StreamedUpscaler

TIMESTEP = 1000.0  # one step, from noise to the video
SEED_STEP = 0x9E3779B97F4A7C15  # from window to window
SMALL_PIECE = 1 << 16  # pixels that the decoder's convolutions make at a time where memory is short

R = TypeVar("R")


@dataclass(frozen=True)
class Room:
    """How a step makes do with the device's memory, in the words of the log."""

    name: str
    parked: bool = True
    piece_pixels: int | None = None
    alone: bool = False  # the transformer leaves for what is done beside its passes

    def __str__(self) -> str:
        return self.name


ROOMS = (
    Room("as planned", parked=False),
    Room("with what the decoder remembers in RAM"),
    Room("in small pieces", piece_pixels=SMALL_PIECE),
    Room("without the transformer beside it", piece_pixels=SMALL_PIECE, alone=True),
)


@dataclass(frozen=True)
class Networks:
    """What computes: the transformer, started, with its prompt `text [1, L, dim]`, and the two small networks."""

    model: StreamedUpscaler
    text: Tensor
    projection: LowQualityProjection
    decoder: TinyVAE
    masked: MaskedAttention


@dataclass(frozen=True)
class Remembered:
    """What outlasts a step: windows of the transformer's layers, and what the decoder saw last."""

    windows: HostWindows
    decoder: DecoderMemory


class UpscaleStream:
    """Give it the small video's frames, `wanted` of them at a time; it gives back as many as it can make of them."""

    def __init__(
        self, networks: Networks, remembered: Remembered, request: UpscaleRequest, size: tuple[int, int]
    ) -> None:
        """`size` is the large video's, (width, height)."""
        self.networks, self.windows, self.request = networks, remembered.windows, request
        self.size, self._padded = size, padded(size)
        self._memory = remembered.decoder
        # the first is what sufficed last; one that parks what is parked is no other
        self._rooms: tuple[Room, ...] = ROOMS[1:] if remembered.decoder.is_parked else ROOMS
        self.num_steps = 0
        self._small: list[Tensor] = []  # frames [h, w, 3] that were projected and are not made yet
        self._seen: Seen = ()

    @property
    def wanted(self) -> int:
        """How many frames the next step takes."""
        return NEXT_FRAMES if self.num_steps else FIRST_FRAMES + AHEAD

    @property
    def num_taken(self) -> int:
        """How many it has taken."""
        return self.num_made + AHEAD if self.num_steps else 0

    @property
    def num_made(self) -> int:
        """How many it has made."""
        return frames_of(self.num_steps)

    @property
    def is_whole(self) -> bool:
        """Whether all that it remembers is of the same step: not where the last one was cut off as it was noted."""
        return self.windows.windows.stop == (self.num_steps + FIRST_WINDOWS - 1 if self.num_steps else 0)

    def step(self, frames: Sequence[Tensor]) -> Tensor:
        """The next frames, uint8 `[t, H, W, 3]`, of `wanted` small ones `[h, w, 3]`; nothing has changed if it fails.

        Of the first 25 frames it makes 21, then 8 of 8. BadLatents where the transformer makes no numbers,
        BadFrames where the decoder does.
        """
        assert len(frames) == self.wanted
        small = [*self._small, *frames]
        latents, seen = self._latents(frames)
        pictures = self._fitting(lambda: self._pictures(latents, small), "decoding")
        self.windows.commit()
        self._memory.commit()
        self._small, self._seen = small[-AHEAD:], seen
        self.num_steps += 1
        return pictures

    def _fitting(self, work: Callable[[], R], what: str, beside: bool = False) -> R:
        """What `work` makes; where the device's memory does not suffice, in the next room, for the rest of the run.

        The transformer stays for what is done by it, or `beside` it.
        """

        def made(room: Room) -> R:
            self._rooms = self._rooms[self._rooms.index(room) :]
            decoder = self.networks.decoder
            if room.parked:
                self._memory.park()
            if room.piece_pixels is not None:
                decoder.config = replace(decoder.config, piece_pixels=room.piece_pixels)
            if room.alone and not beside:
                self.networks.model.stop()
            return work()

        return first_fitting(self._rooms, made, what)

    def shown(self, frames: Sequence[Tensor]) -> Tensor:
        """Small frames as the networks see them, `[1, 3, t, H, W]`."""
        projection = self.networks.projection
        device = projection.conv1.weight.device
        made = [enlarged(frame.to(device), self.size, self._padded).to(projection.dtype) for frame in frames]
        return torch.stack(made, dim=1)[None]

    # What it remembers

    def tensors(self) -> dict[str, Tensor]:
        """All but the windows and the frames that it has seen last, by names."""
        memory = {f"memory_{place}": tensor for place, tensor in self._memory.tensors().items()}
        return {**{f"seen_{number}": tensor for number, tensor in enumerate(self._seen)}, **memory}

    def take_up(self, num_steps: int, tensors: Mapping[str, Tensor], small: Iterator[Tensor]) -> Tensor:
        """Go on from where `tensors` were; the frames `small` are all of the video, those that were taken go.

        The last one of those. ValueError where there are fewer than there were.
        """
        self._seen = tuple(tensors[f"seen_{number}"] for number in range(2))
        self._memory.take_up({int(name.split("_")[1]): each for name, each in tensors.items() if name[:7] == "memory_"})
        self.num_steps = num_steps
        last = list(islice(small, self.num_made, self.num_taken))
        if len(last) != AHEAD:
            raise ValueError("the video is shorter than it was")
        self._small = last
        return last[-1]

    def begin_anew(self) -> None:
        """Forget all."""
        self.num_steps, self._small, self._seen = 0, [], ()
        self._memory.take_up({})
        self.windows.windows = range(0)

    # A step

    def _latents(self, frames: Sequence[Tensor]) -> tuple[Tensor, Seen]:
        """The next latent frames, and what the projection saw last."""
        additions, seen = self._fitting(lambda: self._projected(frames), "looking at the small video")
        if self._memory.is_parked:
            seen = tuple(each.cpu() for each in seen)
        return self._fitting(lambda: self._denoised(additions), "denoising", beside=True), seen

    def _denoised(self, additions: tuple[Tensor, ...]) -> Tensor:
        num_latents = WINDOW * (1 if self.num_steps else FIRST_WINDOWS)
        first = WINDOW * (self.num_steps + FIRST_WINDOWS - 1) if self.num_steps else 0
        noise = self.noise(num_latents)
        networks, shift = self.networks, (float(first), 0.0, 0.0)
        state = WindowPass(self.windows, self.request.windows, networks.masked, additions, first)
        extras = WindowExtras(positions=AxisPositions(shift=shift), window=state)
        time = torch.tensor([TIMESTEP], device=noise.device)
        velocity = networks.model.begun_again(self.windows.begin_pass, noise, time, networks.text, extras)
        self.windows.end_pass()  # their place on the device is the decoder's next
        latents = noise - velocity
        LatentWatch(networks.model.likely_cause()).step(0, 1, latents, latents)
        return latents

    def noise(self, num_latents: int) -> Tensor:
        """That of the next latent frames, the same whenever the run was begun: `[1, 16, T, h, w]`."""
        seed = window_seed(self.request.seed, self.num_steps)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every machine
        width, height = (side // 8 for side in self._padded)
        channels = self.networks.model.config.out_channels
        shape = (1, channels, num_latents, height, width)
        return torch.randn(shape, generator=generator).to(self.networks.projection.conv1.weight.device)

    def _projected(self, new: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Seen]:
        """What is added to the tokens before the first layers, of frames that nobody has seen yet."""
        projection, causal = self.networks.projection, self.request.is_causal
        config, weight, (width, height) = projection.config, projection.conv1.weight, self._padded
        # first of all, in one piece: small ones that stay would cut up the memory that convolutions leave for the pass
        added = weight.new_empty(config.num_layers, len(new) // CLIP, width * height // PIXELS**2, config.dim)
        seen: Seen = tuple(each.to(weight.device) for each in self._seen)
        if not self.num_steps:
            seen, new = projection.begin(self.shown(new[:1]), causal), new[1:]
        for number, first in enumerate(range(0, len(new), CLIP)):
            tokens, seen = projection(self.shown(new[first : first + CLIP]), seen, causal)
            for layer, rows in enumerate(tokens):
                added[layer, number] = rows
        return tuple(added.flatten(1, 2)), seen

    def _pictures(self, latents: Tensor, small: Sequence[Tensor]) -> Tensor:
        """Frames uint8 of latents, one latent frame after the other; the video's first is of a single frame."""
        self._memory.begin()
        watch, made, first = FrameWatch(self.networks.decoder), [], 0
        for latent in latents.unbind(2):
            last = first + (FRAMES if self._memory else 1)
            shown = self.shown(small[first:last])
            frames = decode_next(self.networks.decoder, latent, shown, self._memory)
            watch.see(frames)
            made.append(coloured(frames, shown, self.request.colour, self.size))
            first = last
        watch.end()
        return torch.cat(made)


def window_seed(seed: int, num_steps: int) -> int:
    """That of the noise after so many steps of a run, whose own is below 2**64: each of them makes its own."""
    half = 1 << 63
    return (seed % half + num_steps * SEED_STEP) % half + seed // half * half


def frames_of(num_steps: int) -> int:
    """How many frames so many steps make."""
    return FIRST_FRAMES + NEXT_FRAMES * (num_steps - 1) if num_steps else 0


def made(stream: UpscaleStream, small: Iterator[Tensor], last: Tensor | None = None) -> Iterator[Tensor]:
    """As many large frames as there are small ones `[h, w, 3]`, those that the stream has made left out.

    `small` are those that it has not taken yet, `last` is the one before them. Behind the end the last one is repeated.
    ValueError where there is none.
    """
    num_read, num_given = stream.num_taken, stream.num_made
    while True:
        frames = list(islice(small, stream.wanted))
        num_read += len(frames)
        is_end = len(frames) < stream.wanted
        last = frames[-1] if frames else last
        if last is None:
            raise ValueError("the video has no frames: give one that has some")
        if is_end and num_read <= num_given:
            return
        pictures = stream.step([*frames, *[last] * (stream.wanted - len(frames))])
        count = min(len(pictures), num_read - num_given) if is_end else len(pictures)
        num_given += count
        yield pictures[:count]
