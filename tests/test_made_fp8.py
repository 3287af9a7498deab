"""fp8 products of weights that are stored in another form: their error, their pieces, their scratch."""

import pytest
import torch
from lowvram_video.weights.kernels.gguf_reference import BLOCK_TYPES, random_blocks
from lowvram_video.weights.linear import made_fp8
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.linear.gguf import GGUF_FORMATS
from lowvram_video.weights.linear.int8 import Int8Dequantized
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.projection import Scratch
from lowvram_video.weights.linear.weight_format import WeightFormat
from torch import Tensor, nn

CPU = torch.device("cpu")
OUT, IN = 48, 256
FORMS = ("Q4_K", "Q8_0", "Q6_K", "int8", "int8 of one scale", "int8 convrot")


def layer_of(form: str) -> Linear:
    """A layer whose weight is stored in a form."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(IN, OUT)
    layer.bias = nn.Parameter(torch.randn(OUT, generator=generator), requires_grad=False)
    if form in GGUF_FORMATS:
        blocks = random_blocks(form, OUT * IN // BLOCK_TYPES[form].elements, generator).view(OUT, -1)
        layer.weight, layer.format = nn.Parameter(blocks, requires_grad=False), GGUF_FORMATS[form]
        return layer
    values = torch.randint(-127, 128, (OUT, IN), generator=generator, dtype=torch.int8)
    layer.weight = nn.Parameter(values, requires_grad=False)
    scale = torch.rand((1,) if "one" in form else (OUT, 1), generator=generator) * 1e-3
    layer.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
    layer.format = Int8Dequantized(16 if "convrot" in form else 0)
    return layer


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("form", FORMS)
def test_every_stored_form_is_multiplied_in_fp8_and_again_as_it_was(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(form)
    stored: WeightFormat = layer.format
    x = torch.randn(20, IN, generator=torch.Generator().manual_seed(1))
    weight = stored.dequantize(layer.packed(), torch.float32)
    want = x.double() @ weight.double().t() + layer.bias.double()
    select_compute(layer, [layer], "fp8_fast", CPU)
    assert isinstance(layer.format, made_fp8.Fp8Made) and not layer.is_dense(torch.float32)
    scratch = Scratch(CPU, torch.float32, layer.scratch_elements(torch.float32))
    before = scratch.buffer.data_ptr()
    got = layer.prepare(torch.float32, scratch)(x)
    assert scratch.buffer.data_ptr() == before and scratch.used == OUT * IN // 4  # what was unpacked was given back
    error = relative(got, want)
    print(f"{form}, multiplied in fp8: relative error of the layer {error:.4f}")
    assert 0 < error < 0.05  # rows and weights in fp8: 2.6 % each of normal numbers, more where their sizes differ
    monkeypatch.setattr(made_fp8, "PIECE_ELEMENTS", 7 * IN)
    assert torch.equal(layer.prepare(torch.float32, None)(x), got)
    select_compute(layer, [layer], "fp8_fast", CPU)  # chosen again: of the same stored form
    assert torch.equal(layer.prepare(torch.float32, None)(x), got)
    select_compute(layer, [], "none", CPU)
    assert type(layer.format) is type(stored) and relative(layer(x), want) < 1e-5
