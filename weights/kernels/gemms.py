"""Matrix products of 8-bit numbers with a scale per row and per column, and which one a device runs fastest.

All compute `out = values [m, k] @ weight [n, k].T * rows [m, 1] * columns [n] + bias [n]`.
"""

# No `from __future__ import annotations`: torch.library reads the annotations themselves.
from dataclasses import dataclass
from typing import ClassVar, Protocol, Sequence  # noqa: UP035 - torch 2.4 knows no other, nor list[int]

import torch
from torch import Tensor

from ...system.dtypes import half_dtype
from ...system.kernel_choice import (
    Chosen,
    Trial,
    choose,
    cuda_seconds,
    disagreement,
    kept_when_final,
    relative_error,
    works,
)
from ...system.operators import on_device_of, returns_nothing
from .row_reference import LARGEST, QuantizedRows, RowOps, TorchRowOps
from .tile import Tile

FP8_CAPABILITY = (8, 9)
INT8_CAPABILITY = (7, 5)
PRODUCT_BYTES = 64 << 20  # of int32 at a time: more costs memory and gains nothing


class Gemm(Protocol):
    """`scratch_bytes` are what it takes on a GPU at a time, of however many rows, beside operands and output."""

    scratch_bytes: ClassVar[int]

    @property
    def name(self) -> str: ...

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write the scaled product into `out [m, n]`, a contiguous tensor of the compute dtype; `columns [n]` fp32."""
        ...


@dataclass(frozen=True)
class ReferenceGemm:
    """The same arithmetic in fp32, for any 8-bit dtype and device; for tests and devices that have nothing else."""

    scratch_bytes: ClassVar[int] = 0  # a CPU's memory is not planned
    name: str = "reference"

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        product = rows.values.float() @ weight.float().t()
        TorchRowOps().rescale(product, rows.scales, columns, bias, out)


@dataclass(frozen=True)
class Fp8Rowwise:
    """`torch._scaled_mm` with the scales inside; bf16 out on a GPU."""

    scratch_bytes: ClassVar[int] = 0
    name: str = "fp8 row-wise"

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        target = _bf16_on_gpu(out)
        torch._scaled_mm(
            rows.values, weight.t(), scale_a=rows.scales, scale_b=columns.view(1, -1),
            bias=None if bias is None else bias.to(target.dtype),
            out_dtype=target.dtype, use_fast_accum=True, out=target,
        )  # fmt: skip
        if target is not out:
            out.copy_(target)


@dataclass(frozen=True)
class Fp8Rescaled:
    """`torch._scaled_mm` without scales, then one pass that scales; where row-wise scales are not built in."""

    scratch_bytes: ClassVar[int] = 0
    ops: RowOps
    name: str = "fp8, then scaled"

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        one, target = torch.ones((), device=weight.device), _bf16_on_gpu(out)  # fp16 could not hold the plain product
        torch._scaled_mm(
            rows.values, weight.t(), scale_a=one, scale_b=one, out_dtype=target.dtype, use_fast_accum=True, out=target
        )
        self.ops.rescale(target, rows.scales, columns, bias, out)


def _bf16_on_gpu(out: Tensor) -> Tensor:
    """What `_scaled_mm` writes to: `out` where it can."""
    if not out.is_cuda or out.dtype == torch.bfloat16:
        return out
    return torch.empty_like(out, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Int8Product:
    """`torch._int_mm` to int32, so many rows at a time that the products stay small, then one pass that scales."""

    scratch_bytes: ClassVar[int] = PRODUCT_BYTES
    ops: RowOps
    name: str = "int8, then scaled"

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        num_rows, (dim, _) = rows.values.shape[0], weight.shape
        step = max(256, PRODUCT_BYTES // (4 * dim) // 128 * 128)
        for first in range(0, num_rows, step):
            part = slice(first, min(first + step, num_rows))
            product = int_mm(rows.values[part], weight)
            self.ops.rescale(product, rows.scales[part], columns, bias, out[part])


def int_mm(values: Tensor, weight: Tensor) -> Tensor:
    """`values [m, k] @ weight [n, k].T` of int8, in int32, `[m, n]`."""
    if not values.is_cuda:
        return _int_mm_in_fp32(values, weight)
    num_rows = values.shape[0]
    if num_rows <= 16:  # cuBLAS takes no fewer than 17
        values = torch.nn.functional.pad(values, (0, 0, 0, 32 - num_rows))
    return torch._int_mm(values, weight.t())[:num_rows]


def _int_mm_in_fp32(values: Tensor, weight: Tensor) -> Tensor:
    """The same on a processor, where PyTorch's own is a plain loop, 20 times slower: fp32 sums of 1,024 products of
    int8 stay within 2**24, where every whole number is one of fp32."""
    total = torch.zeros(values.shape[0], weight.shape[0], dtype=torch.int32, device=values.device)
    for some, those in zip(values.split(1024, dim=1), weight.split(1024, dim=1), strict=True):
        total += (some.float() @ those.float().t()).to(torch.int32)
    return total


# Which is fastest depends on the GPU's generation; the big ones do not fit into the shared memory of every one.
TILES = (Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 3), Tile(128, 128, 64, 4, 4), Tile(128, 256, 64, 8, 3))


@dataclass(frozen=True)
class Int8Triton:
    """A kernel that scales its sums before it writes them."""

    scratch_bytes: ClassVar[int] = 0
    tile: Tile = TILES[2]

    @property
    def name(self) -> str:
        return f"int8 Triton {self.tile}"

    def __call__(self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if torch.compiler.is_compiling():
            multiply_int8(rows.values, rows.scales, weight, columns, bias, self.tile, out)
            return
        from .int8_gemm import launch_int8

        launch_int8(rows, weight, columns, bias, out, self.tile)


@torch.library.custom_op("lowvram_video::multiply_int8", mutates_args=("out",))
def multiply_int8(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    tile: Sequence[int],
    out: Tensor,
) -> None:
    """`Int8Triton` as an operator, which torch.compile calls and does not look into; `tile` is a `Tile`."""
    gemm: Gemm = Int8Triton(Tile(*tile)) if out.is_cuda else ReferenceGemm()
    with on_device_of(out):
        gemm(QuantizedRows(values, scales, values.shape, out.dtype), weight, columns, bias, out)


multiply_int8.register_fake(returns_nothing)


# --- choosing --------------------------------------------------------------------------------------------


def fp8_refusal(device: torch.device) -> str | None:
    """Why this device cannot multiply fp8 numbers, or None."""
    return _refusal(device, FP8_CAPABILITY, "fp8", "RTX 40 or later")


def int8_refusal(device: torch.device) -> str | None:
    """Why this device cannot multiply int8 numbers, or None."""
    return _refusal(device, INT8_CAPABILITY, "int8", "RTX 20 or later")


def _refusal(device: torch.device, needed: tuple[int, int], what: str, cards: str) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"{device} is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    name = torch.cuda.get_device_name(device)
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]} and no {what} matrix units; "
        f"they begin with {needed[0]}.{needed[1]} ({cards})"
    )


def select_fp8_gemm(device: torch.device, ops: RowOps) -> Gemm:
    """The fastest fp8 product of those that agree with the reference here.

    ValueError where there is none; the device's out-of-memory where it has no room to try any.
    """
    if refusal := fp8_refusal(device):
        raise ValueError(f"fp8 matrix products cannot run: {refusal}")
    return _fastest([Fp8Rowwise(), Fp8Rescaled(ops)], torch.float8_e4m3fn, device)


def select_int8_gemm(device: torch.device, ops: RowOps) -> Gemm:
    """The fastest int8 product of those that agree with the reference here; raises as `select_fp8_gemm`."""
    if refusal := int8_refusal(device):
        raise ValueError(f"int8 matrix products cannot run: {refusal}")
    kernels = [Int8Triton(tile) for tile in TILES] if device.type == "cuda" and ops.name == "triton" else []
    return _fastest([Int8Product(ops), *kernels], torch.int8, device)


def _fastest(candidates: Sequence[Gemm], dtype: torch.dtype, device: torch.device) -> Gemm:
    """Of those that agree with the reference: the first on a CPU, the fastest on a GPU (at a Wan layer's size)."""

    def check(gemm: Gemm) -> str | None:
        # a fraction of a kernel's tile, and several whole ones: the compiler makes other code of them
        sizes = (gemm_error(gemm, dtype, device, inputs=inputs) for inputs in (96, 512))
        return next(filter(None, map(disagreement, sizes)), None)

    if device.type == "cpu":
        return choose(Trial("8-bit products", device, check), [*candidates, ReferenceGemm()]).best
    trial = Trial(f"products of {dtype}", device, check, lambda gemm: gemm_seconds(gemm, dtype, device))
    return choose(trial, candidates).best


def gemm_error(
    gemm: Gemm, dtype: torch.dtype, device: torch.device, num_rows: int = 48, columns: int = 64, inputs: int = 96
) -> float:
    """Relative difference to the reference on a small product."""
    arguments = _operands(num_rows, columns, inputs, dtype, device)
    out, want = (torch.empty(num_rows, columns, dtype=arguments[3].dtype, device=device) for _ in range(2))
    gemm(*arguments, out)
    ReferenceGemm()(*arguments, want)
    return relative_error(out, want)


def gemm_seconds(gemm: Gemm, dtype: torch.dtype, device: torch.device, m: int = 4096, n: int = 5120) -> float:
    """Median time on the GPU of one product `[m, 5120] x [n, 5120]`."""
    arguments = _operands(m, n, 5120, dtype, device)
    out = torch.empty(m, n, dtype=arguments[3].dtype, device=device)
    return cuda_seconds(lambda: gemm(*arguments, out), device)


def _operands(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[QuantizedRows, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    largest = LARGEST[dtype]
    values, weight = ((draw(rows, k) * (largest / 6)).clamp_(-largest, largest).to(dtype) for rows in (m, n))
    scales, columns = draw(m, 1).abs_() * 1e-3, draw(n).abs_() * 1e-3
    out_dtype = half_dtype(device) if device.type == "cuda" else torch.float32
    return QuantizedRows(values, scales, torch.Size((m, k)), out_dtype), weight, columns, draw(n).to(out_dtype)


@kept_when_final
def fuses_gelu(device: torch.device) -> Chosen[bool]:
    """Whether a product can end with GELU (tanh approximation) in its own kernel: cuBLASLt's epilogue."""
    if device.type != "cuda" or not hasattr(torch, "_addmm_activation"):
        return Chosen(False)
    return works("GELU with a product", device, lambda: _gelu_disagreement(device))


def _gelu_disagreement(device: torch.device) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(256, 256, generator=generator, device=device, dtype=half_dtype(device)) for _ in range(2))
    bias, out = weight[0].clone(), torch.empty_like(x)
    torch._addmm_activation(bias, x, weight.t() * 0.1, use_gelu=True, out=out)
    want = torch.addmm(bias, x, weight.t() * 0.1).float()
    return disagreement(relative_error(out, torch.nn.functional.gelu(want, approximate="tanh")))
