"""The HunyuanVideo autoencoder, which FramePack works in.

Source of the architecture and of the parameter names: diffusers' AutoencoderKLHunyuanVideo (HunyuanVideo,
arXiv:2412.03603).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...vae.checks import check_latent, check_video
from .blocks import NORM_EPS, CausalConv3d, DownStage, MiddleBlock, UpStage
from .frames import Clip, FrameStore


@dataclass(frozen=True)
class VAEConfig:
    """Dimensions of a HunyuanVideo autoencoder; the defaults are the released one's.

    `block_out_channels` are the channels at each resolution, from pixels to latent; `layers_per_block` counts the
    encoder's residual blocks at each (the decoder has one more). `latents_at_once` are the official temporal
    tile; `name`, `models` and `file_name` are for messages.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    num_groups: int = 32
    scaling_factor: float = 0.476986
    latents_at_once: int = 16
    decoded_channels: int = 3
    name: str = "HunyuanVideo"
    models: str = "HunyuanVideo and FramePack"
    file_name: str = "hunyuan_video_vae_bf16.safetensors"

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position, in height and in width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame; the first latent frame holds a single one."""
        return 2 ** sum(self.temporal)

    @property
    def temporal(self) -> tuple[bool, ...]:
        """Whether the frames are halved (or doubled) too, at each change of resolution; the decoder goes likewise."""
        num_changes = len(self.block_out_channels) - 1
        return tuple(index >= num_changes - 2 for index in range(num_changes))

    def advice(self, latent_channels: int) -> str:
        """What to do about a latent of another VAE."""
        return f"Connect the latent of {self.models} to it."


HUNYUAN_VAE = VAEConfig()


class HunyuanVAE(nn.Module):
    """The HunyuanVideo autoencoder, for inference: whole clips, held frame by frame between the layers.

    Group norms run over all frames and the attention over all earlier ones, so a clip cannot be coded in pieces of
    time without changing it. `store` says where its frames lie meanwhile: on the module's device (the default), or
    partly in host memory (its `device_bytes`), which changes no bit of the result.
    """

    def __init__(
        self,
        config: VAEConfig = HUNYUAN_VAE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device if device is not None else "cpu"):
            self.encoder = Encoder(config)
            self.decoder = Decoder(config)
            self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
            self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.requires_grad_(False).to(dtype=dtype).eval()

    @property
    def device(self) -> torch.device:
        # one half may never have been read
        return (self.quant_conv if self.post_quant_conv.weight.is_meta else self.post_quant_conv).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @torch.inference_mode()
    def encode(self, video: Tensor, store: FrameStore | None = None) -> Tensor:
        """Encode `video` [B, 3, T, H, W] in [-1, 1] to the scaled latent mean [B, 16, (T-1)//4+1, H/8, W/8].

        The video may lie on another device and have another dtype; its frames are moved one by one.
        Raises ValueError when T is not 4n+1 or H, W do not divide by the spatial stride.
        """
        check_video(self.config, video)
        moments = self.quant_conv(self.encoder(video, Clip(store or FrameStore())))
        mean = moments.chunk(2, dim=1)[0]
        return (mean.float() * self.config.scaling_factor).to(self.dtype)

    @torch.inference_mode()
    def decode(self, latent: Tensor, store: FrameStore | None = None) -> Tensor:
        """Decode a scaled `latent` [B, 16, T, h, w] to video [B, 3, 4(T-1)+1, 8h, 8w] on the module's device.

        The values are the network's: about [-1, 1], not clamped. `decode_bytes` says how much memory it takes.
        Raises ValueError when the latent does not belong to this autoencoder.
        """
        check_latent(self.config, latent)
        z = (latent.to(self.device).float() / self.config.scaling_factor).to(self.dtype)
        return self.decoder(self.post_quant_conv(z), Clip(store or FrameStore()))

    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        """`decode`, which makes the video in one piece."""
        yield self.decode(latent)

    def num_pieces(self, num_latents: int) -> int:
        """One: norms run over the whole clip."""
        return 1


class Encoder(nn.Module):
    """Video [B, 3, T, H, W] to latent moments [B, 2z, T', h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims, groups = config.block_out_channels, config.num_groups
        self.conv_in = CausalConv3d(3, dims[0])
        self.down_blocks = nn.ModuleList(
            DownStage(in_dim, dim, config.layers_per_block, groups, temporal)
            for in_dim, dim, temporal in zip((dims[0], *dims), dims, (*config.temporal, None), strict=False)
        )
        self.mid_block = MiddleBlock(dims[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, dims[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.latent_channels)

    def forward(self, video: Tensor, clip: Clip) -> Tensor:
        """`clip` is empty: it gives its store to those that follow."""
        clip = self.conv_in.read(video, clip)
        for stage in self.down_blocks:
            clip = stage(clip)
        return self.conv_out.finish(self.mid_block(clip), self.conv_norm_out)


class Decoder(nn.Module):
    """Latent [B, z, T, h, w] to video [B, 3, 4(T-1)+1, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims, groups = config.block_out_channels[::-1], config.num_groups
        self.conv_in = CausalConv3d(config.latent_channels, dims[0])
        self.mid_block = MiddleBlock(dims[0], groups)
        self.up_blocks = nn.ModuleList(
            UpStage(in_dim, dim, config.layers_per_block + 1, groups, temporal)
            for in_dim, dim, temporal in zip((dims[0], *dims), dims, (*config.temporal, None), strict=False)
        )
        self.conv_norm_out = nn.GroupNorm(groups, dims[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(dims[-1], 3)

    def forward(self, z: Tensor, clip: Clip) -> Tensor:
        """`clip` is empty: it gives its store to those that follow."""
        clip = self.mid_block(self.conv_in.read(z, clip))
        for stage in self.up_blocks:
            clip = stage(clip)
        return self.conv_out.finish(clip, self.conv_norm_out)


@dataclass(frozen=True)
class DecodeFootprint:
    """Bytes that decoding one clip takes beside the weights and the video it returns.

    `clip_bytes` is the largest clip (or pair of clips) between two layers, the part that a store may hold elsewhere;
    `scratch_bytes` is what one frame's convolution takes, always on the device. These are tensors: PyTorch's allocator
    has reserved up to a fifth more for them (channels last, fp16, 69 frames of 640x608: 16.1 GiB for 13.6).
    """

    clip_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.clip_bytes + self.scratch_bytes


def decode_footprint(config: VAEConfig, latent_frames: int, height: int, width: int, itemsize: int) -> DecodeFootprint:
    """What `HunyuanVAE.decode` takes for one clip of `latent_frames` and `height` x `width` pixels.

    `itemsize` is the bytes of a number: 2 in half precision. For the released autoencoder at its full resolution the
    clips take 256 numbers per pixel and frame, and the scratch up to 1,280 per pixel.
    """
    dims = config.block_out_channels[::-1]
    clip = scratch = 0
    frames, scale = latent_frames, config.spatial_stride
    for index, dim in enumerate(dims):
        in_dim = dims[max(index - 1, 0)]
        area = (height // scale) * (width // scale)
        padded = (height // scale + 2) * (width // scale + 2)
        # A block's clips are its input, or what replaced it, and the hidden one.
        clip = max(clip, max(in_dim, 2 * dim) * frames * area)
        # The ring, a frame of input, of the convolution and of the shortcut; the kernel for each state of the ring.
        scratch = max(scratch, 3 * in_dim * padded + (in_dim + 2 * dim) * area + 81 * in_dim * dim)
        if index < len(config.temporal):
            frames = 2 * frames - 1 if config.temporal[index] else frames
            scale //= 2
            clip = max(clip, dim * frames * area * 4)
            # The ring, a frame in four pieces and whole, the folded kernels.
            scratch = max(scratch, (3 + 4 + 4) * dim * padded + 144 * dim * dim)
    return DecodeFootprint(clip * itemsize, scratch * itemsize)
