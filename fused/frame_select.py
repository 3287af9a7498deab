"""Which implementation runs the steps between a video autoencoder's convolutions on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..system.dtypes import half_dtype
from ..system.kernel_choice import Chosen, Trial, choose, kept_when_final, loaded
from .frame_ops import EagerFrameOps, FrameOps


@kept_when_final
def select_frame_ops(device: torch.device, dtype: torch.dtype) -> Chosen[FrameOps]:
    """Triton kernels on a GPU where they give the eager reference's bits in `dtype`; else eager PyTorch."""
    eager = EagerFrameOps()
    if device.type != "cuda" or dtype.itemsize != 2:
        return Chosen(eager)
    trial: Trial[FrameOps] = Trial(
        "steps of video autoencoders",
        device,
        lambda ops: difference(ops, eager, device, dtype),
        work=f"{device}, {dtype}",
    )
    return choose(trial, loaded(trial.what, _kernels), eager)


def _kernels() -> Sequence[FrameOps]:
    from .frame_kernels import ORDERS, TritonFrameOps

    return tuple(TritonFrameOps(order) for order in ORDERS)


def difference(
    ops: FrameOps, reference: FrameOps, device: torch.device, dtype: torch.dtype | None = None
) -> str | None:
    """What bits of a step are not the reference's, for the widths of the Wan autoencoders, or None."""
    dtype = dtype or half_dtype(device)
    generator = torch.Generator(device).manual_seed(0)

    def rand(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        scaled = values.mul_(8.0 ** values.flip(0).clamp(-4, 4)).to(dtype)  # small and large ones
        return scaled.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else scaled

    for channels in (96, 160, 384, 1024):
        x, other = rand(1, channels, 37, 48), rand(1, channels, 37, 48)
        bias, gamma, other_bias = rand(channels), rand(channels), rand(channels)
        for first, second in ((None, None), (bias, other_bias)):
            results = []
            for each in (ops, reference):
                wide = torch.zeros(1, 3 * channels, 39, 48, device=device, dtype=dtype)
                wide = wide.contiguous(memory_format=torch.channels_last)
                each.norm_silu(x.clone(), first, gamma, wide[:, channels : 2 * channels, 1:-1])
                summed = x.clone()
                each.add_(summed, first, other.clone(), second)
                results.append((wide, summed))
            for got, want, step in zip(*results, ("norm", "sum"), strict=True):
                wrong = int((got != want).sum())
                if wrong:
                    return f"{wrong} of {got.numel()} numbers of the {step} over {channels} channels are others"
    return None
