"""One video on its way through FlashVSR, window by window; what it remembers is as large for any length.

Source: Zhuang et al. 2025 (arXiv:2510.12747); OpenImagingLab/FlashVSR, `diffsynth/pipelines/flashvsr_tiny_long.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ...attention.masked import MaskedAttention
from ...vae.tiny import Memory, TinyVAE
from ..network.embeddings import AxisPositions
from ..network.upscaling import WindowExtras
from ..network.windows import WINDOW, WindowPass
from .decoder import FRAMES, decode_next
from .frames import coloured, enlarged
from .host_windows import FIRST_WINDOWS, HostWindows
from .projection import CLIP, LowQualityProjection, Seen
from .request import UpscaleRequest, padded
from .streamed import AHEAD, FIRST_FRAMES, NEXT_FRAMES, StreamedUpscaler

TIMESTEP = 1000.0  # one step, from noise to the video
SEED_STEP = 0x9E3779B97F4A7C15  # from window to window


@dataclass(frozen=True)
class Networks:
    """What computes: the transformer, started, with its prompt `text [1, L, dim]`, and the two small networks."""

    model: StreamedUpscaler
    text: Tensor
    projection: LowQualityProjection
    decoder: TinyVAE
    masked: MaskedAttention


class UpscaleStream:
    """Give it the small video's frames, `wanted` of them at a time; it gives back as many as it can make of them."""

    def __init__(
        self, networks: Networks, windows: HostWindows, request: UpscaleRequest, size: tuple[int, int]
    ) -> None:
        """`size` is the large video's, (width, height)."""
        self.networks, self.windows, self.request = networks, windows, request
        self.size, self._padded = size, padded(size)
        self.num_steps = 0
        self._small: list[Tensor] = []  # frames [h, w, 3] that were projected and are not made yet
        self._seen: Seen = ()
        self._memory: Memory = {}

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

    def step(self, frames: Sequence[Tensor]) -> Tensor:
        """The next frames, uint8 `[t, H, W, 3]`, of `wanted` small ones `[h, w, 3]`; nothing has changed if it fails.

        Of the first 25 frames it makes 21, then 8 of 8.
        """
        assert len(frames) == self.wanted
        small = [*self._small, *frames]
        latents, seen = self._denoised(frames)
        device = self.networks.projection.conv1.weight.device
        memory = {place: tensor.to(device) for place, tensor in self._memory.items()}
        pictures = self._pictures(latents, small, memory)
        self.windows.commit()
        if self.networks.model.parks_memory:
            memory = {place: tensor.cpu() for place, tensor in memory.items()}
        self._small, self._seen, self._memory = small[-AHEAD:], seen, memory
        self.num_steps += 1
        return pictures

    def shown(self, frames: Sequence[Tensor]) -> Tensor:
        """Small frames as the networks see them, `[1, 3, t, H, W]`."""
        projection = self.networks.projection
        device = projection.conv1.weight.device
        made = [enlarged(frame.to(device), self.size, self._padded).to(projection.dtype) for frame in frames]
        return torch.stack(made, dim=1)[None]

    # What it remembers

    def tensors(self) -> dict[str, Tensor]:
        """All but the windows and the frames that it has seen last, by names."""
        memory = {f"memory_{place}": tensor for place, tensor in self._memory.items()}
        return {**{f"seen_{number}": tensor for number, tensor in enumerate(self._seen)}, **memory}

    def take_up(self, num_steps: int, tensors: Mapping[str, Tensor], small: Iterator[Tensor]) -> Tensor:
        """Go on from where `tensors` were; the frames `small` are all of the video, those that were taken go.

        The last one of those. ValueError where there are fewer than there were.
        """
        device = self.networks.projection.conv1.weight.device
        here = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._seen = tuple(here[f"seen_{number}"] for number in range(2))
        self._memory = {int(name.split("_")[1]): each for name, each in here.items() if name.startswith("memory_")}
        self.num_steps = num_steps
        last = list(islice(small, self.num_made, self.num_taken))
        if len(last) != AHEAD:
            raise ValueError("the video is shorter than it was")
        self._small = last
        return last[-1]

    def begin_anew(self) -> None:
        """Forget all."""
        self.num_steps, self._small, self._seen, self._memory = 0, [], (), {}
        self.windows.windows = range(0)

    # A step

    def _denoised(self, new: Sequence[Tensor]) -> tuple[Tensor, Seen]:
        additions, seen = self._projected(new)
        num_latents = WINDOW * (1 if self.num_steps else FIRST_WINDOWS)
        first = WINDOW * (self.num_steps + FIRST_WINDOWS - 1) if self.num_steps else 0
        noise = self.noise(num_latents)
        networks, shift = self.networks, (float(first), 0.0, 0.0)
        state = WindowPass(self.windows, self.request.windows, networks.masked, additions, first)
        extras = WindowExtras(positions=AxisPositions(shift=shift), window=state)
        time = torch.tensor([TIMESTEP], device=noise.device)
        velocity = networks.model.begun_again(self.windows.begin_pass, noise, time, networks.text, extras)
        return noise - velocity, seen

    def noise(self, num_latents: int) -> Tensor:
        """That of the next latent frames, the same whenever the run was begun: `[1, 16, T, h, w]`."""
        seed = (self.request.seed + self.num_steps * SEED_STEP) % (1 << 63)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every machine
        width, height = (side // 8 for side in self._padded)
        channels = self.networks.model.config.out_channels
        shape = (1, channels, num_latents, height, width)
        return torch.randn(shape, generator=generator).to(self.networks.projection.conv1.weight.device)

    def _projected(self, new: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Seen]:
        """What is added to the tokens before the first layers, of frames that nobody has seen yet."""
        projection, causal, seen = self.networks.projection, self.request.is_causal, self._seen
        if not self.num_steps:
            seen, new = projection.begin(self.shown(new[:1]), causal), new[1:]
        clips: list[list[Tensor]] = []
        for first in range(0, len(new), CLIP):
            tokens, seen = projection(self.shown(new[first : first + CLIP]), seen, causal)
            clips.append(tokens)
        return tuple(torch.cat(layer) for layer in zip(*clips, strict=True)), seen

    def _pictures(self, latents: Tensor, small: Sequence[Tensor], memory: Memory) -> Tensor:
        """Frames uint8 of latents, one latent frame after the other; the video's first is of a single frame."""
        made, first = [], 0
        for latent in latents.unbind(2):
            last = first + (FRAMES if memory else 1)
            shown = self.shown(small[first:last])
            frames = decode_next(self.networks.decoder, latent, shown, memory)
            made.append(coloured(frames, shown, self.request.colour, self.size))
            first = last
        return torch.cat(made)


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
