"""quantization auto_fast: weights as stored, multiplied in fp8 where that is faster within the stated error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.kernel_choice import relative_error
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.kernels.gemms import ReferenceGemm
from lowvram_video.weights.linear import compute, stored_fp8
from lowvram_video.weights.linear.compute import STORED_FP8, select_compute
from lowvram_video.weights.linear.fp8 import Fp8Dequantized, Fp8Matmul
from lowvram_video.weights.linear.gguf import GGUF_FORMATS
from lowvram_video.weights.linear.int8 import Int8Dequantized, Int8Matmul
from lowvram_video.weights.linear.kitchen import KitchenInt8
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.made_fp8 import Fp8Made
from lowvram_video.weights.linear.quantize import IN_BLOCK
from lowvram_video.weights.linear.stored_samples import sample_of
from lowvram_video.weights.linear.weight_format import PLAIN, WeightFormat
from safetensors.torch import load_file
from torch import nn

from . import tiny
from .quantizers import write_gguf

CPU = torch.device("cpu")
FORMS: dict[str, tuple[WeightFormat, torch.dtype]] = {
    "bf16": (PLAIN, torch.bfloat16),
    "fp8": (Fp8Dequantized(), torch.float8_e4m3fn),
    "fp8 e5m2": (Fp8Dequantized(), torch.float8_e5m2),
    "fp8 cast": (PLAIN, torch.float8_e4m3fn),
    "Q8_0": (GGUF_FORMATS["Q8_0"], torch.uint8),
    "Q4_K": (GGUF_FORMATS["Q4_K"], torch.uint8),
}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWVRAM_VIDEO_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "products.json"


def layer_of(form: WeightFormat, dtype: torch.dtype, full_precision: bool = False) -> Linear:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 16
    layer = Linear(256, 64, bias=False)
    layer.format = Fp8Dequantized(full_precision=True) if full_precision else form
    for name, tensor in sample_of(form, weight, dtype).items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Products in fp8 and others take so many seconds; returns what was timed."""

    def use(in_fp8: float, others: float) -> list[str]:
        calls: list[str] = []

        def fake(kind: Any, device: torch.device, form: WeightFormat) -> float:
            calls.append(form.name)
            return in_fp8 if form is kind.in_fp8 else others

        monkeypatch.setattr(stored_fp8, "_seconds", fake)
        return calls

    return use


@pytest.mark.parametrize("name", FORMS)
def test_every_stored_form_is_faster_in_fp8_within_the_stated_error(name: str, timed: Any) -> None:
    form, dtype = FORMS[name]
    timed(1.0, 2.0)
    layer = layer_of(form, dtype)
    weight, x = layer.weight, torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    want = x @ form.dequantize(layer.packed(), torch.float32).t()
    assert stored_fp8.is_fp8_faster([layer], CPU, Fp8Matmul())
    assert select_compute(layer, [layer], STORED_FP8, CPU) == STORED_FP8
    assert isinstance(layer.format, Fp8Matmul | Fp8Made)
    assert layer.weight is weight, "stored as the file has it"
    assert 0 < relative_error(layer.prepare(torch.float32)(x), want) < stored_fp8.FAST_ERROR


def test_the_choice_is_timed_once_and_kept_by_card_versions_and_layer(
    data: Path, timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layer = timed(1.0, 2.0), layer_of(*FORMS["Q4_K"])
    assert stored_fp8.is_fp8_faster([layer], CPU, Fp8Matmul())
    assert calls == ["Q4_K", "Q4_K, multiplied in fp8"] and data.exists()
    timed(2.0, 1.0)
    assert stored_fp8.is_fp8_faster([layer], CPU, Fp8Matmul()), "as it was timed"
    monkeypatch.setattr(stored_fp8, "installed_versions", lambda packages: {"triton": "9.9"})
    assert not stored_fp8.is_fp8_faster([layer], CPU, Fp8Matmul()), "timed anew"
    assert not stored_fp8.is_fp8_faster([layer_of(*FORMS["Q8_0"])], CPU, Fp8Matmul()), "another form is another choice"


def test_what_most_weights_are_decides(timed: Any) -> None:
    calls = timed(1.0, 2.0)
    layers = [layer_of(*FORMS[name]) for name in ("Q4_K", "Q8_0", "Q8_0")]
    stored_fp8.is_fp8_faster(layers, CPU, Fp8Matmul())
    assert calls == ["Q8_0", "Q8_0, multiplied in fp8"]


def test_a_product_that_is_off_by_more_is_not_taken(timed: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(ReferenceGemm):
        def __call__(self, rows: Any, weight: Any, columns: Any, bias: Any, out: torch.Tensor) -> None:
            super().__call__(rows, weight, columns, bias, out)
            out.mul_(1.06)

    timed(1.0, 2.0)
    assert not stored_fp8.is_fp8_faster([layer_of(*FORMS["Q4_K"])], CPU, Fp8Matmul(Wrong()))


def test_int8_weights_and_those_of_full_precision_stay_what_they_are(timed: Any) -> None:
    calls = timed(1.0, 2.0)
    exact = layer_of(*FORMS["fp8"], full_precision=True)
    rows = sample_of(Fp8Dequantized(), torch.randn(64, 256), torch.int8)
    int8 = Linear(256, 64, bias=False)
    int8.weight, int8.format = nn.Parameter(rows["weight"], requires_grad=False), Int8Dequantized()
    int8.register_parameter("weight_scale", nn.Parameter(rows["weight_scale"], requires_grad=False))
    assert not stored_fp8.is_fp8_faster([exact, int8], CPU, Fp8Matmul()) and calls == []
    other = layer_of(*FORMS["Q8_0"])
    model = nn.ModuleList([exact, int8, other])
    select_compute(model, [model], STORED_FP8, CPU)
    assert isinstance(exact.format, Fp8Dequantized) and isinstance(int8.format, Int8Matmul)
    assert isinstance(other.format, Fp8Made)


def test_a_processor_multiplies_as_with_none() -> None:
    layer = layer_of(*FORMS["fp8"])
    assert select_compute(layer, [layer], "auto_fast", CPU) == "none"
    assert isinstance(layer.format, Fp8Dequantized)


def test_what_was_chosen_is_part_of_the_run_and_the_same_on_other_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    settings = RunSettings(quantization="auto_fast")
    plain = StreamedWan(path, settings)
    assert plain.arithmetic["quantization"] == "none" and not plain.computes_in_8_bits
    assert plain.checkpoint.tensors == StreamedWan(path, RunSettings()).checkpoint.tensors, (
        "nothing is quantised as it is read"
    )
    monkeypatch.setattr(compute, "_fastest_within_error", lambda *_: STORED_FP8)
    fast = StreamedWan(path, settings)
    assert fast.arithmetic["quantization"] == STORED_FP8 and fast.computes_in_8_bits
    monkeypatch.undo()
    beside = StreamedWan(path, fast.settings_beside(CPU))
    assert beside.arithmetic["quantization"] == STORED_FP8


def test_auto_fast_takes_what_all_cards_of_a_pass_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    older = iter([None, None, "RTX 3090 has no fp8 matrix units", None])  # its card; both cards; its card again
    monkeypatch.setattr(compute, "_no_fp8", lambda device: next(older))
    monkeypatch.setattr(compute, "is_fp8_faster", lambda *_: True)
    model = StreamedWan(tiny.save_wan(tmp_path / "wan.safetensors"), RunSettings(quantization="auto_fast"))
    assert model.quantization == STORED_FP8
    model.use_cards((CPU,))
    products = {(each.quantization, each.arithmetic["products"]) for each in (model, *model._others)}
    assert products == {("none", StreamedWan(model.path, RunSettings()).arithmetic["products"])}
    assert "auto_fast unpacks weights: RTX 3090 has no fp8 matrix units" in caplog.text
    model.use_cards(())
    assert model.quantization == STORED_FP8


def test_a_run_says_what_products_it_is_made_with(tmp_path: Path) -> None:
    """One that was made with others is another run, whatever the quantization was called then and is called now."""
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    told = [StreamedWan(path, RunSettings(quantization=name)).arithmetic["products"] for name in ("none", "fp8_fast")]
    num_layers = len(StreamedWan(path, RunSettings()).costs.busy_layers)
    assert told == [f"{num_layers} plain", f"{num_layers} fp8 matmul"]
    made = StreamedWan(path, RunSettings(quantization="fp8_fast"))
    made.costs.busy_layers[0].format = Fp8Made(GGUF_FORMATS["Q8_0"], Fp8Matmul())
    assert made.arithmetic["products"] == f"1 Q8_0, multiplied in fp8, {num_layers - 1} fp8 matmul"


def test_int8_products_are_the_same_whoever_makes_them() -> None:
    layers = [Linear(64, 64), Linear(64, 64), Linear(64, 64)]
    for layer, form in zip(layers, (KitchenInt8(), Int8Matmul(), PLAIN), strict=True):
        layer.format = form
    assert compute.describe_products(layers) == "2 int8 matmul, 1 plain"


@pytest.mark.parametrize("quantization", ["fp8_fast", "auto_fast"])
def test_a_gguf_file_is_kept_as_it_is(tmp_path: Path, quantization: str) -> None:
    tensors = load_file(tiny.save_wan(tmp_path / "wan.safetensors"))
    kinds = {
        name: (each, "Q8_0" if IN_BLOCK.search(name) and each.ndim == 2 else "F32") for name, each in tensors.items()
    }
    model = StreamedWan(write_gguf(tmp_path / "wan.gguf", kinds), RunSettings(quantization=quantization))
    layer = model.blocks[0].get_submodule("ffn.0")
    assert isinstance(layer, Linear) and layer.weight.dtype == torch.uint8
    assert layer.format.name == {"fp8_fast": "Q8_0, multiplied in fp8", "auto_fast": "Q8_0"}[quantization]
    assert model.checkpoint.tensors["blocks.0.ffn.0.weight"].nbytes == layer.weight.nbytes
