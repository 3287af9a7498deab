"""weights/linear/kitchen_matmul.py and native.py: 4-bit files multiply as stored where that is right and faster."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch
from lowvram_video.weights.linear import native
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.linear.kitchen import KITCHEN_QUANTS, PACKAGE, KitchenFormat
from lowvram_video.weights.linear.kitchen_matmul import NATIVE_PRODUCTS, KitchenMatmul, native_refusal
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.stored_samples import stored_sample
from torch import nn

from .test_fp8 import rand, relative

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
W4A4 = KitchenFormat(KITCHEN_QUANTS["convrot_w4a4"])
needs_kitchen = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs comfy-kitchen")


class StandIn:
    """comfy-kitchen as far as refusals ask it."""

    def __init__(self, **cuda: Any):
        self.cuda = {"available": True, "disabled": False, "capabilities": list_of_functions(), **cuda}

    def list_backends(self) -> dict[str, Any]:
        return {"cuda": self.cuda}


def list_of_functions() -> list[str]:
    return [product.function for product in NATIVE_PRODUCTS.values()]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card of a compute capability, with a comfy-kitchen."""

    def of(capability: tuple[int, int], **kitchen: Any) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(importlib, "import_module", lambda name: StandIn(**kitchen))

    return of


@pytest.mark.parametrize(
    ("name", "too_old", "enough"),
    [("nvfp4", (9, 0), (12, 0)), ("convrot_w4a4", (7, 0), (7, 5)), ("asym_w4a8_int8", (7, 5), (8, 6))],
)
def test_cards_without_the_units_are_refused(
    name: str, too_old: tuple[int, int], enough: tuple[int, int], card: Any
) -> None:
    form = KitchenFormat(KITCHEN_QUANTS[name])
    card(too_old)
    have, needed = (".".join(map(str, each)) for each in (too_old, NATIVE_PRODUCTS[name].capability))
    reason = native_refusal(form, GPU)
    assert reason is not None and f"Some GPU has compute capability {have}; its product needs {needed} (RTX" in reason
    card(enough)
    assert native_refusal(form, GPU) is None
    card(enough, disabled=True)
    assert "CUDA kernels are not usable here" in str(native_refusal(form, GPU))
    card(enough, capabilities=[])
    assert f"no CUDA kernel {NATIVE_PRODUCTS[name].function}: update it" in str(native_refusal(form, GPU))


def test_what_is_no_4_bit_form_is_refused(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card((12, 0))
    assert "are no 4-bit numbers" in str(native_refusal(KitchenFormat(KITCHEN_QUANTS["mxfp8"]), GPU))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install comfy-kitchen" in str(native_refusal(W4A4, GPU))


def test_a_model_without_4_bit_weights_is_refused() -> None:
    model = nn.Sequential(Linear(64, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"4bit_fast, but no layer .*stored as: plain torch.bfloat16.*expected nvfp4"):
        select_compute(model, [model], "4bit_fast", CPU)


def test_the_refusal_says_what_to_choose(card: Any) -> None:
    card((7, 0))
    with pytest.raises(ValueError, match=r"4bit_fast, but rotated 4-bit integers .*7\.0.*choose quantization none"):
        native.use_native([layer_of(W4A4)], GPU)


@pytest.mark.parametrize(
    ("difference", "milliseconds", "chosen"),
    [(0.1, (1.0, 2.0), KitchenMatmul), (0.1, (2.0, 1.0), KitchenFormat), (0.9, (1.0, 2.0), KitchenFormat)],
)
def test_native_products_are_taken_where_they_are_right_and_faster(
    difference: float,
    milliseconds: tuple[float, float],
    chosen: type,
    card: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    card((8, 9))
    times = dict(zip((KitchenMatmul, KitchenFormat), milliseconds, strict=True))
    monkeypatch.setattr(native, "layer_difference", lambda *_: difference)
    monkeypatch.setattr(native, "form_seconds", lambda tried, *_: times[type(tried)] / 1e3)
    layers = [layer_of(W4A4), layer_of(W4A4), layer_of(W4A4, outputs=40)]
    with caplog.at_level(logging.INFO):
        native.use_native(layers, GPU)
    assert [type(layer.format) for layer in layers] == [chosen, chosen, KitchenFormat], "40 is no multiple of 16"
    said = (
        "a layer differs by 10.0 % from the unpacked" if chosen is KitchenMatmul else "gains nothing for convrot_w4a4"
    )
    assert said in caplog.text


def test_another_quantization_unpacks_again() -> None:
    layer = layer_of(W4A4)
    layer.format = KitchenMatmul(W4A4)
    model = nn.Sequential(layer)
    select_compute(model, [model], "none", CPU)
    assert layer.format == W4A4


def layer_of(form: KitchenFormat, outputs: int = 64) -> Linear:
    layer = Linear(512, outputs, dtype=torch.bfloat16)
    layer.format = form
    layer.weight = nn.Parameter(torch.zeros(outputs, 256, dtype=torch.int8), requires_grad=False)
    return layer


@needs_kitchen
@pytest.mark.parametrize(("name", "unpacked_error"), [("convrot_w4a4", 0.2), ("asym_w4a8_int8", 0.1)])
def test_a_layer_is_what_it_is_unpacked(name: str, unpacked_error: float) -> None:
    """Against the plain product in fp64, and against the layer unpacked, within what activations lose."""
    form = KitchenFormat(KITCHEN_QUANTS[name])
    weight, x, bias = rand(128, 512) / 512**0.5, rand(2, 25, 512, seed=1).bfloat16(), rand(128, seed=2).bfloat16()
    packed = stored_sample(form, weight.bfloat16())
    project, unpacked = (each.prepare(packed, bias, x.dtype, None) for each in (KitchenMatmul(form), form))
    out = torch.empty(2, 25, 128, dtype=x.dtype)
    project(x, out=out)
    assert torch.equal(out, project(x)), "into what is given, or anew"
    print(f"{name}: {relative(out, unpacked(x)):.3f} to the unpacked")
    assert relative(out, unpacked(x)) < NATIVE_PRODUCTS[name].error
    assert relative(out, x.double() @ weight.double().t() + bias.double()) < unpacked_error


@needs_kitchen
def test_what_nvfp4_loses() -> None:
    """Its product runs on RTX 50 alone; here both sides are quantised and multiplied in fp32."""
    import comfy_kitchen

    form = KitchenFormat(KITCHEN_QUANTS["nvfp4"])
    x, weight = rand(64, 512).bfloat16(), rand(256, 512, seed=1).bfloat16() / 512**0.5
    rows = NATIVE_PRODUCTS["nvfp4"].quantize(comfy_kitchen, x)
    multiplied = comfy_kitchen.dequantize_nvfp4(rows.values, rows.scale, rows.blocks, torch.float32)
    unpacked = form.dequantize(stored_sample(form, weight), torch.float32)
    error = relative(multiplied @ unpacked.t(), x.float() @ unpacked.t())
    print(f"nvfp4: {error:.3f} to the unpacked")
    assert error < NATIVE_PRODUCTS["nvfp4"].error


@needs_kitchen
def test_activations_that_a_file_smooths() -> None:
    form = KitchenFormat(KITCHEN_QUANTS["asym_w4a8_int8"])
    weight, x, smooth = rand(64, 512) / 512**0.5, rand(20, 512, seed=1).bfloat16(), rand(512, seed=3).abs() + 0.5
    packed = {**stored_sample(form, (weight / smooth).bfloat16()), "pre_quant_scale": smooth.bfloat16()}
    project, unpacked = (each.prepare(packed, None, x.dtype, None) for each in (KitchenMatmul(form), form))
    assert relative(project(x), unpacked(x)) < NATIVE_PRODUCTS[form.name].error
    assert project.form != KitchenMatmul(form).name, "rows multiplied by its own factors are no other layer's"


@needs_kitchen
def test_4bit_fast_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of(W4A4)
    packed = stored_sample(W4A4, rand(64, 512).bfloat16())
    layer.weight = nn.Parameter(packed["weight"], requires_grad=False)
    model = nn.Sequential(layer)
    select_compute(model, [model], "4bit_fast", CPU)
    assert layer.format == KitchenMatmul(W4A4) and layer.scratch_elements(torch.bfloat16) == 0
