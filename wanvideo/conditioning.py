"""Pictures and videos as conditions: extra latent channels, the first latent frame of TI2V, control videos of VACE.

Source: Wan-Video/Wan2.1 `wan/image2video.py`, `wan/first_last_frame2video.py`, Wan2.2 `wan/textimage2video.py`,
ali-vilab/VACE `vace/models/wan/wan_vace.py`; Fun Control as in ComfyUI's `comfy_extras/nodes_wan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vae.tiling import encode_fitting
from .network.config import WanConfig
from .network.model import Extras, Nag
from .request import WanRequest
from .vae.model import WanVAE

MASK_CHANNELS = 4


@dataclass(frozen=True)
class Pictures:
    """What a video is shown, on the CPU: pictures `[1, 3, 1, H, W]` in -1 ... 1 of the video's size.

    `control [1, 3, T, H, W]` are at most as many frames as it has, 4n + 1 of them.
    """

    first: Tensor | None = None
    last: Tensor | None = None
    reference: Tensor | None = None
    control: Tensor | None = None

    def all(self) -> list[Tensor | None]:
        """Every one, given or not."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Conditions:
    """What the model is shown beside the noisy latent."""

    cond: Tensor  # [1, 512, text_dim]
    uncond: Tensor | None
    image_tokens: Tensor | None = None  # [1, 257 or 514, image_dim] of models that read CLIP's features
    extras: Extras = field(default_factory=Extras)  # control videos of VACE, a reference picture of Fun models
    channels: Tensor | None = None  # [1, c, T, h, w] of models that take more than noise, concatenated to the latent
    first_frame: Tensor | None = None  # [1, z, 1, h, w] of TI2V, held fixed at timestep 0
    nag: Nag | None = None  # for the passes of the prompt


def with_latents(
    conditions: Conditions, vae: WanVAE, config: WanConfig, request: WanRequest, pictures: Pictures
) -> Conditions:
    """Conditions with the latents of what is shown, by what the model takes; on the device of the text."""
    device, size = conditions.cond.device, request.size
    if config.model_type == "ti2v" and pictures.first is not None:
        return replace(conditions, first_frame=encode_fitting(vae, pictures.first).to(device))
    if config.model_type == "vace":
        strength = 1.0 if request.control_strength is None else request.control_strength
        frames = vace_frames(vae, pictures, size).to(device)
        return replace(conditions, extras=Extras(vace_frames=(frames,), vace_strengths=(strength,)))
    if pictures.reference is not None:
        reference = encode_fitting(vae, pictures.reference)[:, :, 0].to(device)
        conditions = replace(conditions, extras=Extras(reference=reference))
    num_extra = config.in_channels - config.out_channels
    if num_extra == config.out_channels + MASK_CHANNELS:
        channels = image_channels(vae, pictures.first, pictures.last, size[2])
    else:
        channels = control_channels(vae, pictures, size, with_mask=num_extra % config.out_channels > 0)
    return replace(conditions, channels=channels.to(device))


def image_channels(vae: WanVAE, first: Tensor | None, last: Tensor | None, num_frames: int) -> Tensor:
    """What I2V models see beside the noise: mask and latents of a video that is grey but for its given frames.

    `first`, `last` are `[1, 3, 1, H, W]` in -1 ... 1; returns `[1, 4 + z, T, h, w]`, fp32 on the CPU.
    Where the device runs out of memory the video is encoded in tiles.
    """
    given = first if first is not None else last
    if given is None:
        raise ValueError("image-to-video needs a picture: give --image, --end-image or both")
    video, known = _with_frames(given.new_zeros(1, 3, num_frames, *given.shape[-2:]), first, last)
    latent = encode_fitting(vae, video)
    return torch.cat([_mask(known, vae, latent), latent], dim=1)


def control_channels(vae: WanVAE, pictures: Pictures, size: tuple[int, int, int], with_mask: bool) -> Tensor:
    """What Fun Control models see beside the noise: latents of a control video, and of a first frame.

    `size` is (width, height, frames). Returns `[1, z (+ 4) + z, T, h, w]`, fp32 on the CPU: zeros where there is
    neither, and with a mask of the first frame between them where the model has been trained so.
    """
    width, height, num_frames = size
    config, stride = vae.config, vae.config.spatial_stride
    num_latents = (num_frames - 1) // config.temporal_stride + 1
    empty = torch.zeros(1, config.z_dim, num_latents, height // stride, width // stride)
    parts = []
    for given in (pictures.control, pictures.first):
        latent = empty.clone()
        if given is not None:
            encoded = encode_fitting(vae, given)
            latent[:, :, : encoded.shape[2]] = encoded
        parts.append(latent)
    if with_mask:
        known = torch.zeros(num_frames)
        known[0] = float(pictures.first is not None)
        parts.insert(1, _mask(known, vae, empty))
    return torch.cat(parts, dim=1)


def vace_frames(vae: WanVAE, pictures: Pictures, size: tuple[int, int, int]) -> Tensor:
    """What VACE models are steered by, `[1, 2 z + 64, T, h, w]`, fp32 on the CPU; `size` is (width, height, frames).

    Latents of what shall stay (given frames, grey elsewhere) and of what shall be made after (the control video, grey
    where there is none), and a mask of the latter, a channel for each pixel of a latent's square. A reference picture
    is a frame before the first.
    """
    width, height, num_frames = size
    video = torch.zeros(1, 3, num_frames, height, width)
    if pictures.control is not None:
        video[:, :, : pictures.control.shape[2]] = pictures.control
    video, known = _with_frames(video, pictures.first, pictures.last)
    made = (1 - known).view(1, 1, -1, 1, 1)
    latent = torch.cat([encode_fitting(vae, video * (1 - made)), encode_fitting(vae, video * made)], dim=1)
    times = F.interpolate(1 - known[None, None], size=latent.shape[2], mode="nearest-exact")
    mask = times[..., None, None].expand(1, vae.config.spatial_stride**2, -1, *latent.shape[-2:])
    frames = torch.cat([latent, mask], dim=1)
    if pictures.reference is None:
        return frames
    first = torch.zeros_like(frames[:, :, :1])
    first[:, : vae.config.z_dim] = encode_fitting(vae, pictures.reference)
    return torch.cat([first, frames], dim=2)


def _with_frames(video: Tensor, first: Tensor | None, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """`video [1, 3, T, H, W]` with its given frames in their places, and `[T]` 1 for those, else 0."""
    known = torch.zeros(video.shape[2])
    if first is not None:
        video[:, :, :1], known[0] = first, 1
    if last is not None:
        video[:, :, -1:], known[-1] = last, 1
    return video, known


def _mask(known: Tensor, vae: WanVAE, latent: Tensor) -> Tensor:
    """`[1, 4, T, h, w]` of the frames that are known, in the size of `latent`.

    It has a channel for each of the four frames that a latent frame stands for; the first latent frame stands for one,
    counted four times.
    """
    frames = torch.cat([known[:1].repeat(vae.config.temporal_stride), known[1:]])
    mask = frames.view(-1, vae.config.temporal_stride).t()  # [4, T]
    return mask[None, :, :, None, None].expand(1, -1, -1, *latent.shape[-2:]).to(latent)
