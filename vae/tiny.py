"""Tiny decoders of Wan's and HunyuanVideo's latents, for drafts: TAEHV, and those of LightX2V that share its layers.

Source of the architecture and of the parameter names: madebyollin/taehv `taehv.py` (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_latent
from .layouts import lies_channels_last

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)  # frames of one, after each resolution
Memory = MutableMapping[int, Tensor]  # what each block that remembers saw last, by its place


@dataclass(frozen=True)
class TinyConfig:
    """One tiny decoder.

    `widths` are the channels of its four resolutions, `growth` how many frames each but the last makes of one, and
    `patch_size` the side of the pixel squares that a position of the last becomes.
    """

    name: str
    models: str
    file_name: str
    latent_channels: int
    patch_size: int = 1
    widths: tuple[int, int, int, int] = WIDTHS
    growth: tuple[int, int, int] = GROWTH
    latents_at_once: None = None  # time costs no memory
    decoded_channels: int = 3
    deep: bool = False
    piece_pixels: int = 1 << 20  # that go through convolutions at a time

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position, in height and in width."""
        return 8 * self.patch_size

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame; the first latent frame holds a single one."""
        first, second, third = self.growth
        return first * second * third

    def advice(self, latent_channels: int) -> str:
        """What to do about a latent of another VAE."""
        known = next((each for each in (TINY_16, TINY_48) if each.latent_channels == latent_channels), None)
        if known is None:
            return "Connect the latent of a Wan or FramePack model to it."
        return f"Latents of {known.models} models need {known.file_name}."

    def decode_bytes(self, height: int, width: int, itemsize: int) -> int:
        """What decoding pictures of `height` x `width` pixels takes beside the weights, at most."""
        positions = (height // self.patch_size) * (width // self.patch_size)
        first, second, third, fourth = self.widths
        last = 2 * third + 2 * fourth  # enlarged, and what convolutions make of it
        remembered = 3 * (third // 4 + second // 16 + first // 64)
        earlier = 3 * second // 4 + remembered
        return positions * (last + earlier) * itemsize + 2 * height * width * 3 * self.temporal_stride * itemsize


TINY_16 = TinyConfig(
    "TAEHV (16 channels)",
    "Wan 2.1, Wan 2.2 A14B and FramePack",
    "taew2_1.safetensors or lighttaew2_1.safetensors for Wan, taehv.safetensors for FramePack",
    16,
)
TINY_48 = TinyConfig(
    "TAEHV (48 channels)", "Wan 2.2 TI2V 5B", "taew2_2.safetensors or lighttaew2_2.safetensors", 48, patch_size=2
)


class TinyVAE(nn.Module):
    """A tiny decoder, for inference: one frame at a time goes through, and keeps no state in the module."""

    def __init__(
        self, config: TinyConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device if device is not None else "cpu"):
            self.decoder = nn.Sequential(*_layers(config))
        self.requires_grad_(False).to(dtype=dtype).eval()

    @property
    def device(self) -> torch.device:
        return self._first.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.weight.dtype

    @property
    def _first(self) -> nn.Conv2d:
        first = self.decoder[1]
        assert isinstance(first, nn.Conv2d)
        return first

    def encode(self, video: Tensor) -> NoReturn:
        """ValueError: a draft is only looked at."""
        raise ValueError(
            f"{self.config.name} only decodes, for drafts: encode pictures with the whole VAE "
            "(wan_2.1_vae, wan2.2_vae or hunyuan_video_vae_bf16)"
        )

    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode `latent` [B, z, T, h, w], in the scale of its file, yielding frames [B, 3, t, H, W]: 1, then 4 each.

        Frames are about [-1, 1], not clamped: of an infinite number only 1 would be left. Raises ValueError at the
        call, before any work, when the latent is of another decoder.
        """
        check_latent(self.config, latent)
        return self._decode_pieces(latent)

    def num_pieces(self, num_latents: int) -> int:
        """How many pieces `decode_pieces` yields."""
        return num_latents

    def _decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        memory: Memory = {}
        for index, position in enumerate(latent.unbind(2)):
            frames = self._decode_frame(position, memory)
            # the first position is of one frame, the last of those that it is made into
            yield frames if index else frames[:, :, -1:]

    def _decode_frame(self, position: Tensor, memory: Memory) -> Tensor:
        return self.frames_of(position, memory).mul(2).sub(1)

    @torch.inference_mode()
    def frames_of(self, position: Tensor, memory: Memory) -> Tensor:
        """The frames `[B, 3, t, H, W]` of a latent one `[B, z, h, w]`, about 0 to 1; `memory` is kept for the next."""
        frames = self._frames_from(position.to(self.device, self.dtype), 0, memory)
        return torch.stack([F.pixel_shuffle(frame, self.config.patch_size) for frame in frames], dim=2)

    def _frames_from(self, x: Tensor, first: int, memory: Memory) -> Iterator[Tensor]:
        """The frames that layers from `first` on make of one, in order of time; each block remembers its last input."""
        for index in range(first, len(self.decoder)):
            layer = self.decoder[index]
            if isinstance(layer, Remembering):
                past = memory.get(index)
                memory[index] = x
                pieces = Pieces(self.config.piece_pixels, layer.num_convolutions)
                x = pieces.apply(layer, [x, torch.zeros_like(x) if past is None else past])
            elif isinstance(layer, nn.Upsample):
                # one frame becomes several while it is small: each position's pixels are the same
                growth, following = self.decoder[index + 1], self._until_memory(index + 2)
                assert isinstance(growth, Growth)
                larger = _Enlarged(layer, [*self.decoder][index + 2 : following])
                pieces = Pieces(self.config.piece_pixels, larger.num_rows_seen, larger.scale)
                for number in range(growth.num_frames):
                    made = pieces.apply(larger, [growth.frame(x, number)])
                    yield from self._frames_from(made, following, memory)
                return
            else:
                x = layer(x)
        yield x

    def _until_memory(self, first: int) -> int:
        """The place of the next block that remembers, or the end."""
        places = (place for place in range(first, len(self.decoder)) if isinstance(self.decoder[place], Remembering))
        return next(places, len(self.decoder))


class _Enlarged:
    """Layers over a frame that is enlarged first."""

    def __init__(self, upsample: nn.Upsample, layers: Sequence[nn.Module]) -> None:
        self._layers = (upsample, *layers)
        assert isinstance(upsample.scale_factor, int | float)  # the same to all sides
        self.scale = round(upsample.scale_factor)
        num_convolutions = sum(isinstance(layer, nn.Conv2d) for layer in layers)
        self.num_rows_seen = -(-num_convolutions // self.scale)

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Pieces:
    """Layers over some rows of a frame at a time, so many pixels of what they make, which is `scale` times as large.

    They see `rows_seen` rows of their neighbours. Layers pad with zeros, and so only at the frame's edges: rows that a
    piece's own edge has been padded for are cut off.
    """

    pixels: int
    rows_seen: int
    scale: int = 1

    def apply(self, layer: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """`layer(*inputs)`, each `[B, C, h, w]`."""
        height, width = inputs[0].shape[2:]
        count = -(-height * width * self.scale**2 // self.pixels)
        if count == 1:
            return layer(*inputs)
        step = -(-height // count)
        whole: Tensor | None = None
        for first in range(0, height, step):
            last = min(first + step, height)
            begin, end = max(0, first - self.rows_seen), min(height, last + self.rows_seen)
            made = layer(*(each[:, :, begin:end] for each in inputs))
            if whole is None:
                layout = torch.channels_last if lies_channels_last(made) else torch.contiguous_format
                size = (*made.shape[:2], height * self.scale, made.shape[3])
                whole = torch.empty(size, dtype=made.dtype, device=made.device, memory_format=layout)
            rows = slice((first - begin) * self.scale, (last - begin) * self.scale)
            whole[:, :, first * self.scale : last * self.scale] = made[:, :, rows]
        assert whole is not None
        return whole


class SoftClamp(nn.Module):
    """Latents to -3 ... 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Remembering(nn.Module):
    """Three convolutions over a frame [B, C, h, w] and the one before it, beside a shortcut."""

    num_convolutions = 3

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(2 * dim, dim), nn.ReLU(), _conv(dim, dim), nn.ReLU(), _conv(dim, dim))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class Growth(nn.Module):
    """A frame [B, C, h, w] to several, in order of time."""

    def __init__(self, dim: int, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.conv = nn.Conv2d(dim, num_frames * dim, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.frame(x, number) for number in range(self.num_frames))

    def frame(self, x: Tensor, number: int) -> Tensor:
        """One of them."""
        return F.conv2d(x, self.conv.weight.chunk(self.num_frames)[number])


def _layers(config: TinyConfig) -> list[nn.Module]:
    widths = config.widths
    layers: list[nn.Module] = [SoftClamp(), _conv(config.latent_channels, widths[0]), *_activated(config, widths[0])]
    for dim, next_dim, num_frames in zip(widths, widths[1:], config.growth, strict=False):
        layers += [Remembering(dim) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), Growth(dim, num_frames), _conv(dim, next_dim, bias=False)]
    return [*layers, *_activated(config, widths[-1]), _conv(widths[-1], 3 * config.patch_size**2)]


def _activated(config: TinyConfig, dim: int) -> list[nn.Module]:
    return [nn.ReLU(), _conv(dim, dim, bias=False), nn.ReLU()] if config.deep else [nn.ReLU()]


def _conv(in_dim: int, out_dim: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=bias)
