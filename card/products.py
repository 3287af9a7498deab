"""Linear layers of each form and width on a device: time, rate, and how far the result is from the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..system.card_profile import ProductRow
from ..system.kernel_choice import disagreement, relative_error
from ..weights.linear.projection import Scratch
from .clock import attempted, median_seconds
from .forms import Form

CHECKED_ROWS = 64


@dataclass(frozen=True)
class ProductSizes:
    """Widths (dim, hidden) of the blocks whose layers are measured, the widest last, and how many rows at a time."""

    widths: Sequence[tuple[int, int]]
    rows: int


# of Wan 1.3B, of Wan TI2V 5B and FramePack, and of Wan 14B
SIZES = ProductSizes(((1536, 8960), (3072, 14336), (5120, 13824)), 8192)
QUICK_SIZES = ProductSizes(((5120, 13824),), 8192)
CPU_SIZES = ProductSizes(((512, 1536),), 256)


def shapes_of(sizes: ProductSizes, form: Form) -> list[tuple[int, int]]:
    """(inputs, outputs) of the layers that are measured in a form."""
    if not form.every_shape:
        widest = sizes.widths[-1][0]
        return [(widest, widest)]
    return [shape for dim, hidden in sizes.widths for shape in ((dim, dim), (dim, hidden), (hidden, dim))]


def measure_products(form: Form, sizes: ProductSizes, device: torch.device, dtype: torch.dtype) -> Iterator[ProductRow]:
    """One row for each layer of the form, as it is done."""
    for inputs, outputs in shapes_of(sizes, form):
        row = ProductRow(form.name, inputs, outputs, sizes.rows)
        yield replace(row, problem=form.unusable) if form.unusable else _measured(form, row, device, dtype)


def _measured(form: Form, row: ProductRow, device: torch.device, dtype: torch.dtype) -> ProductRow:
    weight_elements = row.inputs * row.outputs
    # the weight in fp32 as it is stored and checked, unpacked and packed; rows in, out and quantised
    needed = 12 * weight_elements + 2 * dtype.itemsize * row.rows * (row.inputs + row.outputs)
    found = attempted(lambda: _timed(form, row, device, dtype), needed, device)
    return replace(row, problem=found) if isinstance(found, str) else found


def _timed(form: Form, row: ProductRow, device: torch.device, dtype: torch.dtype) -> ProductRow:
    weight, x, bias = layer_input(row.inputs, row.outputs, row.rows, device, dtype)
    packed = form.pack(weight)
    scratch = Scratch(device, dtype, form.format.scratch_elements(packed, dtype))
    wrong, error = _check(form, packed, weight, (x[:CHECKED_ROWS], bias))
    if wrong is not None:
        return replace(row, problem=wrong)
    del weight
    out = torch.empty(row.rows, row.outputs, device=device, dtype=dtype)

    def prepare() -> None:
        scratch.reset()
        form.format.prepare(packed, bias, dtype, scratch)

    unpacks = form.format.scratch_elements(packed, dtype) > 0
    unpacking = median_seconds(prepare, device, most=0.2) if unpacks else 0.0
    project = form.format.prepare(packed, bias, dtype, _fresh(scratch))
    seconds = median_seconds(lambda: project(x, out=out), device)
    return replace(
        row,
        milliseconds=round(1e3 * seconds, 4),
        prepare_milliseconds=round(1e3 * unpacking, 4),
        tflops=_significant(2 * row.rows * row.inputs * row.outputs / seconds / 1e12),
        relative_error=_significant(error),
    )


def _check(
    form: Form, packed: Mapping[str, Tensor], weight: Tensor, given: tuple[Tensor, Tensor]
) -> tuple[str | None, float]:
    """What is wrong with a form's layer, or None, and its error against fp32."""
    x, bias = given
    kept = form.reference(packed) if form.reference is not None else weight.float()
    want = x.float() @ kept.t() + bias.float()
    got = form.format.prepare(packed, bias, x.dtype, None)(x)
    error = relative_error(got, want)
    return disagreement(error if error == error else float("inf"), form.bound), error


def layer_input(
    inputs: int, outputs: int, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[outputs, inputs]`, rows `[rows, inputs]`, a bias; always the same.

    The rows are of different size with a few large features, as modulated norms make them.
    """
    generator = torch.Generator(device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(generator=generator)

    weight = draw(outputs, inputs).div_(inputs**0.5)
    x = draw(rows, inputs)
    x *= torch.exp(0.5 * torch.randn(rows, 1, device=device, generator=generator)).to(dtype)
    x[:, :: max(1, inputs // 8)] *= 10
    return weight, x, draw(outputs)


def _fresh(scratch: Scratch) -> Scratch:
    scratch.reset()
    return scratch


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
