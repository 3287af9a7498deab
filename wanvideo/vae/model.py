"""The Wan 2.1 and 2.2 video autoencoders.

Source of the architecture and of the parameter names: Wan-Video `wan/modules/vae2_1.py` and `vae2_2.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...vae.checks import check_latent, check_video
from ...vae.outbox import Finish
from ...vae.strips import Strips
from .blocks import CausalConv3d, FrameChanger, Head, ResidualBlock, SpatialAttention
from .coding import Decoding, Encoding, OnChunk, Side
from .resampling import Downsample, Upsample
from .stages import DownStage, UpStage

OnFrame = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class VAEConfig:
    """One Wan video autoencoder.

    `patch_size` is the side of the pixel squares folded into channels around the network; `residual_shortcuts` adds a
    parameter-free shortcut around each resolution (and keeps the channel count in upsampling). `latent_mean` and
    `latent_std` hold one value per latent channel. `models` and `file_name` are for messages. `encoded_channels` and
    `decoded_channels` are those of a pixel: 4 with transparency, 12 for a decoder that makes 2 x 2 pixels of each.
    """

    name: str
    models: str
    file_name: str
    z_dim: int
    encoder_dim: int
    decoder_dim: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    residual_shortcuts: bool = False
    encoded_channels: int = 3
    decoded_channels: int = 3

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position, in height and in width."""
        return self.patch_size * 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame; the first latent frame holds a single one."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    @property
    def latents_at_once(self) -> None:
        """Time is never cut: it costs no memory."""
        return None

    def advice(self, latent_channels: int) -> str:
        """What to do about a latent of another VAE."""
        for known in (WAN21_VAE, WAN22_VAE):
            if known.z_dim == latent_channels:
                return f"Latents of {known.models} models need the {known.name} VAE ({known.file_name})."
        return "Connect the latent of a Wan model to it."


# fmt: off
WAN21_VAE = VAEConfig(
    name="Wan 2.1", models="Wan 2.1 and Wan 2.2 A14B", file_name="wan_2.1_vae.safetensors",
    z_dim=16, encoder_dim=96, decoder_dim=96,
    latent_mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    latent_std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)

WAN22_VAE = VAEConfig(
    name="Wan 2.2", models="Wan 2.2 TI2V 5B", file_name="wan2.2_vae.safetensors",
    z_dim=48, encoder_dim=160, decoder_dim=256, patch_size=2, residual_shortcuts=True,
    latent_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latent_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)
# fmt: on


class WanVAE(nn.Module):
    """A Wan video autoencoder, for inference: coding works frame by frame and keeps no state in the module."""

    def __init__(
        self, config: VAEConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device if device is not None else "cpu"):
            self.encoder = Encoder(config)
            self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
            self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
            self.decoder = Decoder(config)
        if dtype is not None:
            self.to(dtype)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        # one half may never have been read
        return (self.conv1 if self.conv2.weight.is_meta else self.conv2).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def encode(self, video: Tensor) -> Tensor:
        """Encode `video` [B, 3, T, H, W] in [-1, 1] to the normalised latent mode [B, z, (T-1)//4+1, h, w].

        The video may lie on another device and have another dtype: 1, 4, 4, ... frames at a time are moved.
        Raises ValueError when T is not 4n+1 or H, W do not divide by the spatial stride.
        """
        check_video(self.config, video)
        return self.encoding(video.shape).whole(video)

    def encode_strips(self, video: Tensor, way: Strips, on_chunk: OnChunk | None = None) -> Tensor:
        """`encode` in strips: the same latent, in the memory of one strip. A chunk is a latent frame of a strip."""
        check_video(self.config, video)
        return self.encoding(video.shape).in_strips(video, way, on_chunk)

    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode a normalised `latent` [B, z, T, h, w], yielding frames [B, 3, 1, H, W], then [B, 3, 4, H, W] each.

        Frames come as soon as their latent frame is done; their values are the network's: about [-1, 1], not clamped,
        as of an infinite number only 1 would be left. The latent may lie on another device.
        Closing or dropping the iterator frees what the pass held; several may run at once.
        Raises ValueError at the call, before any work, when the latent does not belong to this autoencoder.
        """
        check_latent(self.config, latent)
        return self.decoding(latent.shape).whole(latent)

    def decode_strips(
        self,
        latent: Tensor,
        way: Strips,
        finish: Finish,
        into: Tensor | None = None,
        on_chunk: OnChunk | None = None,
    ) -> Iterator[Tensor]:
        """The pieces of `decode_pieces`, `finish`ed, on the CPU, in the memory of one strip.

        They are parts of `into` [B, 3, T, H, W], where given; none is whole before the last strip. A chunk is one piece
        of one strip. `finish` sees rows of frames.
        """
        check_latent(self.config, latent)
        return self.decoding(latent.shape).in_strips(latent, way, finish, into, on_chunk)

    def decoding(self, latent_shape: Sequence[int]) -> Decoding:
        """A pass of the decoder over latents [B, z, T, h, w]."""
        patch, (mean, std) = self.config.patch_size, self._latent_statistics()

        def enter(frame: Tensor) -> Tensor:
            return pointwise(self.conv2, (frame.float() * std + mean).to(self.dtype))

        def leave(pixels: Tensor) -> Tensor:
            return unfold_pixels(pixels, patch)

        side = self._side(self.decoder, enter, leave)
        return Decoding(side, latent_shape, self.decoder.conv1.weight)

    def encoding(self, video_shape: Sequence[int]) -> Encoding:
        """A pass of the encoder over video [B, 3, T, H, W]."""
        config, (mean, std) = self.config, self._latent_statistics()

        def enter(frame: Tensor) -> Tensor:
            return fold_pixels(frame.to(self.device, self.dtype), config.patch_size)

        def leave(moments: Tensor) -> Tensor:
            mode = pointwise(self.conv1, moments).chunk(2, dim=1)[0]
            return ((mode.float() - mean) / std).to(self.dtype)

        batch, _, frames, height, width = video_shape
        step, stride = config.temporal_stride, config.spatial_stride
        shape = batch, config.z_dim, (frames - 1) // step + 1, height // stride, width // stride
        side = self._side(self.encoder, enter, leave)
        return Encoding(side, shape, self.encoder.conv1.weight)

    def num_pieces(self, num_latents: int) -> int:
        """How many pieces `decode_pieces` yields."""
        return num_latents

    def _side(self, network: Encoder | Decoder, enter: OnFrame, leave: OnFrame) -> Side:
        config = self.config
        stride = config.spatial_stride // config.patch_size
        return Side(network.whole, network.local, enter, leave, stride, config.patch_size, config.temporal_stride)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each latent channel, [1, z, 1, 1]; the device is waited for."""
        values = torch.tensor([self.config.latent_mean, self.config.latent_std], device=self.device)
        mean, std = values.view(2, 1, -1, 1, 1)
        return mean, std


class Encoder(nn.Module):
    """Frames of folded pixels [B, 3p², H, W] to latent moments [B, 2z, h, w]: one of the first, then one of four."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.encoder_dim * mult for mult in config.dim_mult]
        self.conv1 = CausalConv3d(config.encoded_channels * config.patch_size**2, config.encoder_dim, (3, 3, 3))
        stages: list[nn.Module] = []
        in_dim = config.encoder_dim
        for index, out_dim in enumerate(dims):
            layers: list[nn.Module] = [
                ResidualBlock(out_dim if n else in_dim, out_dim) for n in range(config.num_res_blocks)
            ]
            halves = index < len(config.temporal_downsample)
            temporal = halves and config.temporal_downsample[index]
            if halves:
                layers.append(Downsample(out_dim, temporal))
            if config.residual_shortcuts:
                stages.append(DownStage(layers, in_dim, out_dim, 1 + temporal, 1 + halves))
            else:
                stages.extend(layers)
            in_dim = out_dim
        self.downsamples = nn.Sequential(*stages)
        self.middle = middle_block(dims[-1])
        self.head = Head(dims[-1], 2 * config.z_dim)

    @property
    def local(self) -> list[nn.Module]:
        """The layers that see pixels nearby, which may run in strips."""
        return [self.conv1, *list(self.downsamples)[: self._num_local]]

    @property
    def whole(self) -> list[nn.Module]:
        """The layers that follow, on whole frames of the latent's size."""
        return [*list(self.downsamples)[self._num_local :], *self.middle, self.head]

    @property
    def _num_local(self) -> int:
        """Stages up to the last that halves frames."""
        changers = [index for index, stage in enumerate(self.downsamples) if isinstance(stage, FrameChanger)]
        halving = [index for index in changers if getattr(self.downsamples[index], "space_factor", 2) > 1]
        return halving[-1] + 1


class Decoder(nn.Module):
    """Latent frames [B, z, h, w] to frames of folded pixels [B, 3p², H, W]: one of the first, then four of each."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.decoder_dim * mult for mult in reversed(config.dim_mult)]
        temporal_upsample = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.middle = middle_block(dims[0])
        stages: list[nn.Module] = []
        in_dim = dims[0]
        for index, out_dim in enumerate(dims):
            layers: list[nn.Module] = [
                ResidualBlock(out_dim if n else in_dim, out_dim) for n in range(config.num_res_blocks + 1)
            ]
            doubles = index < len(temporal_upsample)
            temporal = doubles and temporal_upsample[index]
            enlarged_dim = out_dim if config.residual_shortcuts else out_dim // 2
            if doubles:
                layers.append(Upsample(out_dim, enlarged_dim, temporal))
            if config.residual_shortcuts:
                stages.append(UpStage(layers, in_dim, out_dim, 1 + temporal, 1 + doubles))
            else:
                stages.extend(layers)
            in_dim = enlarged_dim
        self.upsamples = nn.Sequential(*stages)
        self.head = Head(dims[-1], config.decoded_channels * config.patch_size**2)

    @property
    def whole(self) -> list[nn.Module]:
        """The first layers, on whole frames of the latent's size."""
        return [self.conv1, *self.middle, *list(self.upsamples)[: self._num_whole]]

    @property
    def local(self) -> list[nn.Module]:
        """The layers that follow and see what is nearby, which may run in strips."""
        return [*list(self.upsamples)[self._num_whole :], self.head]

    @property
    def _num_whole(self) -> int:
        """Residual blocks before the first stage that doubles frames."""
        return next(index for index, stage in enumerate(self.upsamples) if isinstance(stage, FrameChanger))


def pointwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 1x1x1 convolution of one frame [B, C, h, w]."""
    return F.conv2d(x, conv.weight[:, :, 0], conv.bias)


def middle_block(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), SpatialAttention(dim), ResidualBlock(dim, dim))


def fold_pixels(x: Tensor, patch_size: int) -> Tensor:
    """Pixels to channels: every `patch_size` square becomes one position, width before height."""
    if patch_size == 1:
        return x
    return rearrange(x, "b c (h q) (w r) -> b (c r q) h w", q=patch_size, r=patch_size)


def unfold_pixels(x: Tensor, patch_size: int) -> Tensor:
    """The inverse of `fold_pixels`."""
    if patch_size == 1:
        return x
    return rearrange(x, "b (c r q) h w -> b c (h q) (w r)", q=patch_size, r=patch_size)
