"""Clips between the layers of the HunyuanVideo autoencoder: single frames, wherever there is room for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...system.host_memory import allocate_bytes
from ...vae.layouts import lies_channels_last

HostAllocator = Callable[[int], Tensor]  # bytes -> a contiguous uint8 CPU tensor of at least that many


@dataclass(frozen=True)
class Kept:
    """A frame in a store: itself, or its copy in the host memory `buffer` and the device that it came from."""

    frame: Tensor
    buffer: Tensor | None = None
    device: torch.device | None = None


class FrameStore:
    """Where the frames [B, C, h, w] of a clip lie between two layers.

    They stay on the compute device up to `device_bytes` in all (None: every one); the others lie in host memory, bit
    for bit. `allocate` gives that: pageable by default; from pinned memory copies are several times faster. Freed
    buffers are used again. Copies go through the current stream, so they stay in order with the layers. `check` is
    called before every frame and raises to stop. A store serves one pass after another, but not on after one that was
    interrupted.
    """

    def __init__(
        self,
        device_bytes: int | None = None,
        allocate: HostAllocator = allocate_bytes,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.device_bytes = device_bytes
        self._used_bytes = 0
        self._allocate, self._check = allocate, check
        self._free: list[Tensor] = []

    def keep(self, frame: Tensor) -> Kept:
        """Take over a frame of the compute device."""
        if self._check is not None:
            self._check()
        if self.device_bytes is None or self._used_bytes + frame.nbytes <= self.device_bytes:
            self._used_bytes += frame.nbytes
            return Kept(frame)
        if not frame.is_contiguous(memory_format=torch.channels_last):
            frame = frame.contiguous()
        buffer = self._take_buffer(frame.nbytes)
        host = buffer[: frame.nbytes].view(frame.dtype).as_strided(frame.shape, frame.stride())
        host.copy_(frame, non_blocking=True)
        return Kept(host, buffer, frame.device)

    def load(self, kept: Kept) -> Tensor:
        """The frame on the compute device; not to be written to."""
        if kept.buffer is None:
            return kept.frame
        # Same strides on both sides: one plain copy of bytes.
        frame = torch.empty_like(kept.frame, device=kept.device)
        return frame.copy_(kept.frame, non_blocking=True)

    def drop(self, kept: Kept) -> None:
        """Let go of a frame that is not needed again."""
        if kept.buffer is None:
            self._used_bytes -= kept.frame.nbytes
        else:
            self._free.append(kept.buffer)

    def _take_buffer(self, nbytes: int) -> Tensor:
        fitting = [index for index, buffer in enumerate(self._free) if buffer.numel() >= nbytes]
        if not fitting:
            # Frames only grow from here on, or shrink to parts of these: what is too small now stays so.
            self._free.clear()
            return self._allocate(nbytes)
        buffer = self._free.pop(min(fitting, key=lambda index: self._free[index].numel()))
        rest = buffer[-(-nbytes // 64) * 64 :]  # a frame of half the channels leaves room for another
        if rest.numel():
            self._free.append(rest)
        return buffer[:nbytes]


@dataclass(frozen=True)
class NormSiLU:
    """A group norm whose statistics are known, as one multiplication and addition per channel, and SiLU.

    `scale` and `shift` are [B, C, 1, 1] in float32.
    """

    scale: Tensor
    shift: Tensor

    def write(self, frame: Tensor, out: Tensor) -> None:
        """Normalise `frame` [B, C, h, w] into `out`, of the same shape, with SiLU."""
        nn.functional.silu(self.normalise(frame, out), inplace=True)

    def normalise(self, frame: Tensor, out: Tensor) -> Tensor:
        """The norm alone."""
        return torch.addcmul(self.shift, frame, self.scale, out=out)


class Clip:
    """Frames [B, C, h, w] in order of time, and the statistics that a group norm over all of them takes.

    The statistics are gathered frame by frame in float32, as frames are appended: no norm reads a clip twice.
    """

    def __init__(self, store: FrameStore) -> None:
        self._store = store
        self._frames: list[Kept | None] = []
        self._moments: list[tuple[Tensor, Tensor]] = []  # variance and mean of each frame, [B, C]

    def __len__(self) -> int:
        return len(self._frames)

    def fresh(self) -> Clip:
        """An empty clip in the same store."""
        return Clip(self._store)

    def append(self, frame: Tensor) -> None:
        self._moments.append(channel_moments(frame))
        self._frames.append(self._store.keep(frame))

    def load(self, index: int) -> Tensor:
        """A frame that stays in the clip."""
        kept = self._frames[index]
        assert kept is not None, f"frame {index} has been taken"
        return self._store.load(kept)

    def take(self, index: int) -> Tensor:
        """A frame that leaves the clip, for good; the statistics stay."""
        frame = self.load(index)
        kept, self._frames[index] = self._frames[index], None
        assert kept is not None
        self._store.drop(kept)
        return frame

    def group_norm(self, norm: nn.GroupNorm) -> NormSiLU:
        """`norm` over the whole clip, each group over its channels and all frames (Wu and He, arXiv:1803.08494)."""
        # [frames, B, groups, channels of a group]; all of them come from as many values.
        variances, means = (
            torch.stack(moments).unflatten(2, (norm.num_groups, -1)) for moments in zip(*self._moments, strict=True)
        )
        mean = means.mean(dim=(0, 3), keepdim=True)
        variance = (variances + (means - mean).square()).mean(dim=(0, 3), keepdim=True)
        inverse = torch.rsqrt(variance + norm.eps).expand(means[:1].shape)[0].flatten(1)
        scale = inverse * norm.weight.float()
        shift = norm.bias.float() - mean.expand(means[:1].shape)[0].flatten(1) * scale
        return NormSiLU(scale[:, :, None, None], shift[:, :, None, None])


def channel_moments(frame: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel of a frame [B, C, h, w], both [B, C] in float32."""
    if frame.is_cuda and lies_channels_last(frame):
        return _moments_of_pixels(frame)
    if frame.dtype == torch.float32:
        variance, mean = torch.var_mean(frame, dim=(2, 3), correction=0)
        return variance, mean
    # Sums in float32 without a copy of the frame in it; what cancels is below the rounding of the values themselves.
    count = frame.shape[2] * frame.shape[3]
    mean = frame.sum(dim=(2, 3), dtype=torch.float32) / count
    square = torch.linalg.vector_norm(frame, dim=(2, 3), dtype=torch.float32).square() / count
    return (square - mean.square()).clamp_min_(0), mean


def _moments_of_pixels(frame: Tensor) -> tuple[Tensor, Tensor]:
    """The same where channels lie last, on a GPU: by batch norm's kernel, which reads the frame once.

    A sum of all pixels has up to 138 MB beside it on an H200, one of squares too, fp32's variance 554
    (`system/reductions.py`); and they take four times as long.
    """
    moments = [torch.batch_norm_stats(sample[None], 0.0) for sample in frame]  # means, and what deviations are 1 over
    means, inverse = (torch.stack(each) for each in zip(*moments, strict=True))
    return variance_of(inverse), means


def variance_of(inverse: Tensor) -> Tensor:
    """The variance, of 1 over the deviation; 0 of 0, as PyTorch has it of an even channel."""
    return inverse.square().reciprocal().masked_fill_(inverse == 0, 0.0)
