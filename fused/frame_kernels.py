"""The steps between convolutions as Triton kernels: one read and one write of a frame for all of a step.

A frame is rows of channels, one for each position. The roundings, and the order in which a norm's squares are summed,
are those of PyTorch's own kernels on a GPU (ATen/native/cuda/Reduce.cuh), so that results are the same to the bit: 32
lanes read a position's channels, each has four sums, and the lanes are added up in pairs. Which channels are a lane's
and which lanes are a pair has changed with PyTorch: see `SumOrder`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..system.grids import cdiv
from ..system.operators import on_device_of
from .frame_ops import EagerFrameOps

LANES = 32
BLOCK = 4096  # elements of a program of the sum


@dataclass(frozen=True)
class SumOrder:
    """`in_fours`: a lane reads four channels at a time, where there are 128 or more, instead of one.

    `halves`: the first pair of lanes are 0 and 16 (PyTorch 2.11), instead of 0 and 1.
    """

    in_fours: bool = True
    halves: bool = True


ORDERS = (SumOrder(), SumOrder(False, False), SumOrder(False, True), SumOrder(True, False))


class TritonFrameOps:
    """See `FrameOps` for what each step computes. What is no frame channels last is left to the eager steps.

    A norm is over a multiple of 32 channels. `exact_exp` is CUDA's own function, which Triton's interpreter lacks.
    """

    def __init__(self, order: SumOrder = ORDERS[0], exact_exp: bool = True) -> None:
        self._eager = EagerFrameOps()
        self._order, self._exact_exp = order, exact_exp

    @property
    def name(self) -> str:
        return "triton" if self._order == ORDERS[0] else f"triton ({self._order})"

    def norm_silu(self, x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor) -> None:
        channels = x.shape[1]
        if channels % LANES or not (is_rows(x) and is_rows(out)):
            self._eager.norm_silu(x, bias, gamma, out)
            return
        positions, at_once = x.shape[2] * x.shape[3], 32 if channels < 4 * LANES else 16
        with on_device_of(x):
            for source, target in _each(x, out):
                _norm_silu_kernel[(cdiv(positions, at_once),)](
                    source, gamma if bias is None else bias, gamma, target, positions, x.stride(3), out.stride(3),
                    channels**0.5, CHANNELS=channels, HAS_BIAS=bias is not None, EXACT_EXP=self._exact_exp,
                    IN_FOURS=self._order.in_fours and channels >= 4 * LANES, HALVES=self._order.halves,
                    POSITIONS=at_once, WIDTH=LANES if channels < 4 * LANES else 4 * LANES, num_warps=4,
                )  # fmt: skip

    def add_(self, x: Tensor, bias: Tensor | None, other: Tensor, other_bias: Tensor | None) -> None:
        channels = x.shape[1]
        if not all(is_rows(each) and each.stride(3) == channels for each in (x, other)):
            self._eager.add_(x, bias, other, other_bias)
            return
        count = x[0].numel()
        with on_device_of(x):
            for target, source in _each(x, other):
                _add_kernel[(cdiv(count, BLOCK),)](
                    target, x if bias is None else bias, source, x if other_bias is None else other_bias, count,
                    channels, HAS_BIAS=bias is not None, HAS_OTHER_BIAS=other_bias is not None, BLOCK=BLOCK,
                    num_warps=8,
                )  # fmt: skip


def _each(x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """The frames of two batches, of which a kernel asks where they begin: for one that is known without a call."""
    return ((x, y),) if len(x) == 1 else zip(x, y, strict=True)


def is_rows(frame: Tensor) -> bool:
    """Whether positions [B, C, h, w] follow each other at one distance, each with its channels side by side."""
    _, channels, height, width = frame.shape
    side_by_side = channels == 1 or frame.stride(1) == 1
    return side_by_side and (height == 1 or frame.stride(2) == width * frame.stride(3)) and frame.stride(3) >= channels


@triton.jit
def _with_bias(x_at, bias_at, inside, dtype: tl.constexpr, HAS_BIAS: tl.constexpr):
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)
        x = (x + bias).to(dtype).to(tl.float32)
    return x


@triton.jit
def _pairs(x, POSITIONS: tl.constexpr, LANES: tl.constexpr, HALVES: tl.constexpr):
    """[POSITIONS, LANES] added up in pairs, [POSITIONS, LANES // 2]."""
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(x, (POSITIONS, 2, LANES // 2)), (0, 2, 1)))
    else:
        left, right = tl.split(tl.reshape(x, (POSITIONS, LANES // 2, 2)))
    return left + right


@triton.jit
def _norm_silu_kernel(
    x_ptr, bias_ptr, gamma_ptr, out_ptr, num_positions, x_stride, out_stride, root,
    CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT_EXP: tl.constexpr, IN_FOURS: tl.constexpr,
    HALVES: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    position = (tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)).to(tl.int64)[:, None]
    exists = position < num_positions
    channel = tl.arange(0, WIDTH)[None, :]
    x_at = x_ptr + position * x_stride + channel
    sums = tl.zeros([POSITIONS, WIDTH], dtype=tl.float32)
    sum1 = tl.zeros([POSITIONS, WIDTH], dtype=tl.float32)
    sum2 = tl.zeros([POSITIONS, WIDTH], dtype=tl.float32)
    for start in tl.static_range(0, CHANNELS, WIDTH):
        inside = exists & (start + channel < CHANNELS)
        x = _with_bias(x_at + start, bias_ptr + start + channel, inside, dtype, HAS_BIAS)
        if WIDTH > 32 or start == 0:
            sums += x * x
        elif start == 32:
            sum1 += x * x
        else:
            sum2 += x * x
    if WIDTH == 32:
        lanes = (sums + sum1) + sum2
    elif IN_FOURS:  # channel 4 l + i is sum i of lane l
        even, odd = tl.split(tl.reshape(sums, (POSITIONS, 32, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        lanes = ((first + second) + third) + fourth
    else:  # channel 32 i + l is
        even, odd = tl.split(tl.permute(tl.reshape(sums, (POSITIONS, 2, 2, 32)), (0, 3, 1, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        lanes = ((first + second) + third) + fourth
    lanes = _pairs(lanes, POSITIONS, 32, HALVES)
    lanes = _pairs(lanes, POSITIONS, 16, HALVES)
    lanes = _pairs(lanes, POSITIONS, 8, HALVES)
    lanes = _pairs(lanes, POSITIONS, 4, HALVES)
    length = tl.sqrt_rn(_pairs(lanes, POSITIONS, 2, HALVES))
    length = tl.where(length < 1e-12, 1e-12, length)  # no number stays none
    scale = tl.div_rn(1.0, length) * root
    out_at = out_ptr + position * out_stride + channel
    for start in tl.static_range(0, CHANNELS, WIDTH):
        inside = exists & (start + channel < CHANNELS)
        x = _with_bias(x_at + start, bias_ptr + start + channel, inside, dtype, HAS_BIAS)
        x = (x * scale).to(dtype).to(tl.float32)
        gamma = tl.load(gamma_ptr + start + channel, mask=start + channel < CHANNELS, other=0.0).to(tl.float32)
        x = (x * gamma).to(dtype).to(tl.float32)
        if EXACT_EXP:
            power = libdevice.exp(-x)
        else:
            power = tl.exp(-x)
        tl.store(out_at + start, tl.div_rn(x, 1.0 + power).to(dtype), mask=inside)


@triton.jit
def _add_kernel(
    x_ptr, bias_ptr, other_ptr, other_bias_ptr, count, channels,
    HAS_BIAS: tl.constexpr, HAS_OTHER_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < count
    channel = (start % channels).to(tl.int32) + tl.arange(0, BLOCK)
    channel = channel % channels
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x = (x + tl.load(bias_ptr + channel).to(tl.float32)).to(dtype).to(tl.float32)
    other = tl.load(other_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_OTHER_BIAS:
        other = (other + tl.load(other_bias_ptr + channel).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(x_ptr + index, (x + other).to(dtype), mask=inside)
