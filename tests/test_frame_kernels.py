"""The kernels between a VAE's convolutions, interpreted on the CPU: the roundings and sums that they promise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")


def total(squares: Tensor, in_fours: bool, halves: bool) -> Tensor:
    """Sums over the channels [P, C] in float32, in the order of PyTorch's reduction on a GPU."""
    padded = F.pad(squares, (0, -squares.shape[1] % 128))
    if in_fours and squares.shape[1] >= 128:
        parts = padded.view(len(squares), -1, 32, 4)
    else:
        parts = padded.view(len(squares), -1, 4, 32).transpose(2, 3)
    lanes = torch.zeros(len(squares), 32, 4)
    for part in parts.unbind(1):
        lanes = lanes + part
    summed = ((lanes[..., 0] + lanes[..., 1]) + lanes[..., 2]) + lanes[..., 3]
    while summed.shape[1] > 1:
        middle = summed.shape[1] // 2
        left, right = (summed[:, :middle], summed[:, middle:]) if halves else (summed[:, 0::2], summed[:, 1::2])
        summed = left + right
    return summed


def check_kernels() -> None:
    from lowvram_video.fused.frame_kernels import ORDERS, TritonFrameOps

    torch.manual_seed(0)
    for order in ORDERS:
        ops = TritonFrameOps(order, exact_exp=False)
        for channels in (32, 96, 160, 384):
            x, other = (torch.randn(2, channels, 5, 11).half().to(memory_format=torch.channels_last) for _ in range(2))
            bias, gamma = torch.randn(channels).half(), (torch.rand(channels) + 0.5).half()
            wide = torch.zeros(2, 3 * channels, 7, 11).half().to(memory_format=torch.channels_last)
            ops.norm_silu(x, bias, gamma, wide[:, channels : 2 * channels, 1:-1])
            y = (x + bias.view(-1, 1, 1)).permute(0, 2, 3, 1).flatten(0, 2)
            scale = (1 / total(y.float().square(), order.in_fours, order.halves).sqrt()) * channels**0.5
            normed = ((y.float() * scale).half() * gamma).float()
            want = (normed / (1 + torch.exp(-normed))).half()
            got = wide[:, channels : 2 * channels, 1:-1].permute(0, 2, 3, 1).flatten(0, 2)
            different = got != want
            print(f"{order}, {channels} channels: {int(different.sum())} of {got.numel()} differ")
            assert different.float().mean() < 1e-3  # Triton's exp off the GPU is another one
            assert torch.allclose(got.float(), want.float(), rtol=2**-9, atol=1e-6)
            assert not wide[:, :channels].any() and not wide[:, :, 0].any() and not wide[:, 2 * channels :].any()
            summed = x.clone(memory_format=torch.preserve_format)
            ops.add_(summed, bias, other, gamma)
            assert torch.equal(summed, (x + bias.view(-1, 1, 1)) + (other + gamma.view(-1, 1, 1)))
    print("all is well")


def test_kernels_round_and_sum_as_they_say():
    if not sys.platform.startswith("linux"):
        pytest.skip("Triton's interpreter")
    done = subprocess.run(
        [sys.executable, "-c", "from lowvram_video.tests.test_frame_kernels import check_kernels; check_kernels()"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0 and "all is well" in done.stdout, done.stderr[-2000:]
