"""Products in fp8 of weights as they are stored, and whether a device makes those faster, within a stated error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...system.dtypes import half_dtype
from ...system.kept_choices import KeptChoices
from ...system.kernel_choice import Trial, choose, cuda_seconds, disagreement, relative_error
from ...system.version import installed_versions
from .fp8 import Fp8Dequantized, Fp8Matmul
from .gguf import GgufFormat
from .int8 import Int8Dequantized
from .kitchen import KitchenFormat
from .linear import Linear
from .made_fp8 import Fp8Made
from .projection import Scratch
from .stored_samples import sample_of
from .weight_format import Plain, WeightFormat

FAST_ERROR = 5e-2  # what a product may be off by from that of the same weight unpacked
TRIED_ROWS = 48  # of activations
# A pass at 832x480x81 has 32,760 rows in such chunks, for which a weight is unpacked once.
TIMED_ROWS, TIMED_CHUNKS = 4096, 8
PACKAGES = ("triton", "triton-windows", "comfy-kitchen")


def fp8_form(layer: Linear, product: Fp8Matmul) -> WeightFormat | None:
    """How a layer's weight is multiplied in fp8: as it is stored, or made fp8 for each pass.

    None where it cannot, or its file asks for full precision.
    """
    form, packed = layer.format, layer.packed()
    if isinstance(form, Fp8Dequantized) and form.full_precision:
        return None
    if isinstance(form, Fp8Dequantized | Plain) and product.suits(packed):
        return replace(product, unscaled=isinstance(form, Plain))
    made = Fp8Made(form, product)
    return made if isinstance(form, _MADE) and made.suits(packed) else None


_MADE = Plain | Fp8Dequantized | GgufFormat | Int8Dequantized | KitchenFormat


@dataclass(frozen=True)
class _Kind:
    """Layers that are stored alike."""

    form: WeightFormat
    in_fp8: WeightFormat
    dtype: torch.dtype
    shape: tuple[int, int]  # [out, in]

    def __str__(self) -> str:
        return f"{self.form.name} of {self.dtype}, {list(self.shape)}"


def is_fp8_faster(layers: Sequence[Linear], device: torch.device, product: Fp8Matmul) -> bool:
    """Whether these layers are multiplied faster in fp8, by a layer of the kind that most of the weights are.

    That is timed once; the answer is kept by card, driver, versions and layer. Int8 weights stay what they are.
    """
    kinds: Counter[_Kind] = Counter()
    for layer in layers:
        form = fp8_form(layer, product)
        if form is not None and not isinstance(layer.format, Int8Dequantized):
            shape = layer.out_features, layer.in_features
            kinds[_Kind(layer.format, form, layer.weight.dtype, shape)] += shape[0] * shape[1]
    if not kinds:
        return False
    kind = kinds.most_common(1)[0][0]
    kept, work = KeptChoices("products", installed_versions(PACKAGES)), _work(kind, device)
    found = kept.find(work, device)
    if found in (kind.form.name, kind.in_fp8.name):
        return found == kind.in_fp8.name
    trial = Trial("products", device, partial(_disagreement, kind, device), partial(_seconds, kind, device), work)
    chosen = choose(trial, (kind.form, kind.in_fp8), kind.form)
    if chosen.is_final:
        kept.keep(work, device, chosen.best.name)
    return chosen.best is kind.in_fp8


def _work(kind: _Kind, device: torch.device) -> str:
    return f"{kind} in {half_dtype(device)}, {TIMED_CHUNKS} chunks of {TIMED_ROWS} rows"


def _disagreement(kind: _Kind, device: torch.device, form: WeightFormat) -> str | None:
    if form is kind.form:
        return None
    packed, x = _layer(kind, device, TRIED_ROWS)
    got, want = (each.prepare(packed, None, x.dtype, None)(x) for each in (form, kind.form))
    return disagreement(relative_error(got, want), FAST_ERROR)


def _seconds(kind: _Kind, device: torch.device, form: WeightFormat) -> float:
    """Median time on the GPU of a layer in a pass: its weight unpacked or made fp8, then chunks of rows multiplied.

    While one is multiplied the host is ahead, as it is in a pass.
    """
    packed, x = _layer(kind, device, TIMED_ROWS)
    scratch = Scratch(device, x.dtype, form.scratch_elements(packed, x.dtype))
    out = x.new_empty(len(x), kind.shape[0])

    def layer() -> None:
        scratch.reset()
        project = form.prepare(packed, None, x.dtype, scratch)
        for _ in range(TIMED_CHUNKS):
            project(x, out=out)

    return cuda_seconds(layer, device)


def _layer(kind: _Kind, device: torch.device, num_rows: int) -> tuple[Mapping[str, Tensor], Tensor]:
    """What is stored of it, and rows of activations."""
    generator, dtype = torch.Generator(device).manual_seed(0), half_dtype(device)
    num_inputs = kind.shape[1]
    weight = torch.randn(kind.shape, generator=generator, device=device, dtype=dtype) / num_inputs**0.5
    x = torch.randn(num_rows, num_inputs, generator=generator, device=device, dtype=dtype)
    return sample_of(kind.form, weight, kind.dtype), x
