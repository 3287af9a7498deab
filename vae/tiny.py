"""Tiny decoders of Wan's and HunyuanVideo's latents, for drafts: TAEHV, and those of LightX2V that share its layers.

Source of the architecture and of the parameter names: madebyollin/taehv `taehv.py` (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_latent

WIDTHS = (256, 128, 64, 64)
GROWTH = (1, 2, 2)  # frames of one, after each resolution


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
        last = 3 * third + 4 * fourth  # enlarged, doubled in time, and what convolutions make of it
        earlier = 3 * second // 4 + 3 * (
            third // 4 + second // 16 + first // 64
        )  # that before, and what blocks remember
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

        Frames are in [-1, 1]. Raises ValueError at the call, before any work, when the latent is of another decoder.
        """
        check_latent(self.config, latent)
        return self._decode_pieces(latent)

    def num_pieces(self, num_latents: int) -> int:
        """How many pieces `decode_pieces` yields."""
        return num_latents

    def _decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        memory: dict[int, Tensor] = {}
        for index, position in enumerate(latent.unbind(2)):
            frames = self._decode_frame(position, memory)
            # the first position is of one frame, the last of those that it is made into
            yield frames if index else frames[:, :, -1:]

    @torch.inference_mode()
    def _decode_frame(self, position: Tensor, memory: dict[int, Tensor]) -> Tensor:
        frames = [
            F.pixel_shuffle(frame, self.config.patch_size).clamp(0, 1).mul(2).sub(1)
            for frame in self._frames_of(position.to(self.device, self.dtype), 0, memory)
        ]
        return torch.stack(frames, dim=2)

    def _frames_of(self, x: Tensor, first: int, memory: dict[int, Tensor]) -> Iterator[Tensor]:
        """The frames that layers from `first` on make of one, in order of time; each block remembers its last input."""
        for index in range(first, len(self.decoder)):
            layer = self.decoder[index]
            if isinstance(layer, Remembering):
                past = memory.get(index)
                memory[index] = x
                x = layer(x, torch.zeros_like(x) if past is None else past)
            elif isinstance(layer, Growth):
                for frame in layer(x):
                    yield from self._frames_of(frame, index + 1, memory)
                return
            else:
                x = layer(x)
        yield x


class SoftClamp(nn.Module):
    """Latents to -3 ... 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Remembering(nn.Module):
    """Three convolutions over a frame [B, C, h, w] and the one before it, beside a shortcut."""

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
        return self.conv(x).chunk(self.num_frames, dim=1)


def _layers(config: TinyConfig) -> list[nn.Module]:
    widths = config.widths
    layers: list[nn.Module] = [SoftClamp(), _conv(config.latent_channels, widths[0]), nn.ReLU()]
    for dim, next_dim, num_frames in zip(widths, widths[1:], config.growth, strict=False):
        layers += [Remembering(dim) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), Growth(dim, num_frames), _conv(dim, next_dim, bias=False)]
    return [*layers, nn.ReLU(), _conv(widths[-1], 3 * config.patch_size**2)]


def _conv(in_dim: int, out_dim: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=bias)
