"""weights/linear/int8.py and kitchen.py: int8 files of every kind, and W8A8 against its own arithmetic in fp64."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lowvram_video.wanvideo.checkpoint import build_wan, open_wan
from lowvram_video.weights.files.checkpoint import CheckpointError, TensorInfo
from lowvram_video.weights.kernels.gemms import Int8Product, ReferenceGemm, int_mm, select_int8_gemm
from lowvram_video.weights.kernels.row_reference import TorchRowOps
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.linear.int8 import Int8Dequantized, Int8Matmul, rotation_matrix
from lowvram_video.weights.linear.kitchen import KITCHEN_QUANTS, KitchenFormat, KitchenInt8, KitchenQuant
from safetensors.torch import load_file, save_file
from torch import Tensor

from .test_fp8 import is_quantised, others, output, rand, relative
from .tiny import load_wan, save_wan

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
GROUP = 64


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("int8") / "wan.safetensors")


def hadamard(size: int) -> Tensor:
    """ConvRot's matrix from its definition: entry -1 where an odd number of base-4 digits add up to 3."""
    entries = [
        [
            (-1) ** sum((i // 4**d) % 4 + (j // 4**d) % 4 == 3 for d in range(size.bit_length() // 2))
            for j in range(size)
        ]
        for i in range(size)
    ]
    return torch.tensor(entries, dtype=torch.float64) / size**0.5


def quantised(tensors: Tensors, per_row: bool, rotated: bool) -> tuple[dict[str, tuple], Tensors]:
    """(values, scale) by layer and the weights that they stand for, in fp64."""
    layers, truth = {}, dict(tensors)
    for name, tensor in tensors.items():
        if is_quantised(name, tensor):
            weight = tensor.double()
            if rotated:
                weight = (weight.unflatten(1, (-1, GROUP)) @ hadamard(GROUP)).flatten(1)
            scale = (weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()) / 127
            scale = scale.float()
            values = (weight / scale).round().to(torch.int8)
            layers[name.removesuffix(".weight")] = values, scale
            stood = values.double() * scale.double()
            truth[name] = ((stood.unflatten(1, (-1, GROUP)) @ hadamard(GROUP)).flatten(1) if rotated else stood).float()
    return layers, truth


def core(tensors: Tensors, layers: dict, convrot: bool = False) -> Tensors:
    fields: dict[str, object] = {"format": "int8_tensorwise"}
    if convrot:
        fields |= {"convrot": True, "convrot_groupsize": GROUP}
    marker = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    out = others(tensors)
    for layer, (values, scale) in layers.items():
        out |= {f"{layer}.weight": values, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": marker.clone()}
    return out


def core_convrot(tensors: Tensors, layers: dict) -> Tensors:
    return core(tensors, layers, True)


def quanto(tensors: Tensors, layers: dict) -> Tensors:
    out = others(tensors)
    for layer, (values, scale) in layers.items():
        out |= {f"{layer}.weight._data": values, f"{layer}.weight._scale": scale}
        out |= {f"{layer}.input_scale": torch.ones(()), f"{layer}.output_scale": torch.ones(())}
    return out


def lightx2v(tensors: Tensors, layers: dict) -> Tensors:
    out = others(tensors)
    for layer, (values, scale) in layers.items():
        out |= {f"{layer}.weight": values, f"{layer}.weight_scale": scale}
    return {"diffusion_model." + name: tensor for name, tensor in out.items()}


# dialect -> (writer, scales per row, rotated)
DIALECTS: dict[str, tuple[Callable[[Tensors, dict], Tensors], bool, bool]] = {
    "int8_tensorwise": (core, False, False),
    "int8_tensorwise per row": (core, True, False),
    "int8_tensorwise convrot": (core_convrot, True, True),
    "quanto": (quanto, True, False),
    "LightX2V": (lightx2v, True, False),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_gives_the_weights_it_stands_for(dialect: str, plain: Path, tmp_path: Path) -> None:
    write, per_row, rotated = DIALECTS[dialect]
    tensors = load_file(plain)
    layers, truth = quantised(tensors, per_row, rotated)
    path = tmp_path / "quantised.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in write(tensors, layers).items()}, path)
    model = load_wan(path)
    for layer in layers:
        module = model.get_submodule(layer)
        assert isinstance(module.format, Int8Dequantized)
        got = module.format.dequantize(module.packed(), torch.float32)
        torch.testing.assert_close(got, truth[f"{layer}.weight"], rtol=1e-5, atol=1e-7)
    save_file(truth, tmp_path / "truth.safetensors")
    exact, near = output(load_wan(tmp_path / "truth.safetensors")), output(load_wan(plain))
    unpacked = output(model)
    select_compute(model, model.blocks, "none", CPU)
    assert all(isinstance(model.get_submodule(layer).format, Int8Matmul) for layer in layers)
    multiplied = output(model)
    print(
        f"{dialect}: unpacked, to the same weights {relative(unpacked, exact):.1e}, "
        f"to the original {relative(unpacked, near):.1e}; W8A8, to the original {relative(multiplied, near):.1e}"
    )
    assert relative(unpacked, exact) < 1e-5
    assert relative(multiplied, near) < 0.03


@pytest.mark.parametrize("gemm", (ReferenceGemm(), Int8Product(TorchRowOps())), ids=lambda gemm: gemm.name)
@pytest.mark.parametrize("rotation", [0, 16])
def test_w8a8_is_its_own_arithmetic(gemm: ReferenceGemm, rotation: int) -> None:
    x, bias = rand(37, 96) * torch.exp(rand(37, 1, seed=4)), rand(40, seed=2)
    weight = torch.randint(-127, 128, (40, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    scale = rand(40, 1, seed=5).abs() / 100
    project = Int8Matmul(rotation, gemm).prepare({"weight": weight, "weight_scale": scale}, bias, torch.float32, None)
    rows = x.double()
    if rotation:
        rows = (rows.unflatten(1, (-1, rotation)) @ hadamard(rotation)).flatten(1)
    row_scale = rows.abs().amax(1, keepdim=True) / 127
    values = (rows / row_scale).round()
    want = (values @ weight.double().t()) * row_scale * scale.double().t() + bias
    out = torch.empty(37, 40)
    assert project(x, out=out) is out
    error = relative(out, want)
    print(f"{gemm.name}, rotation {rotation}: {error:.1e}")
    assert error < 1e-6 or (rotation and error < 1e-3)  # rotated in fp32: a value on a boundary may round otherwise
    torch.testing.assert_close(project(x[:36].view(4, 9, 96)), out[:36].view(4, 9, 40))


def test_many_rows_go_through_small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram_video.weights.kernels.gemms.PRODUCT_BYTES", 1)
    weight = torch.randint(-127, 128, (24, 32), dtype=torch.int8)
    packed = {"weight": weight, "weight_scale": torch.tensor(0.01)}
    x = rand(700, 32)
    got = Int8Matmul(0, Int8Product(TorchRowOps())).prepare(packed, None, torch.float32, None)(x)
    want = Int8Matmul(0, ReferenceGemm()).prepare(packed, None, torch.float32, None)(x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_a_processors_products_of_int8_are_exact(size: int) -> None:
    extreme = torch.full((2, size), -128, dtype=torch.int8)
    values = torch.cat([extreme, torch.randint(-127, 128, (5, size), dtype=torch.int8)])
    weight = torch.cat([-1 - extreme, extreme, torch.randint(-128, 128, (9, size), dtype=torch.int8)])
    assert torch.equal(int_mm(values, weight), (values.long() @ weight.long().t()).int())


def test_rotation_spreads_outliers() -> None:
    """What ConvRot is for: one huge input feature ruins the scale of every row without it."""
    x, weight = rand(64, 256), rand(48, 256, seed=1) / 16
    x[:, 5] *= 100
    want = x.double() @ weight.double().t()
    errors = {}
    for rotation in (0, 256):
        turned = weight.double() @ hadamard(256) if rotation else weight.double()
        scale = (turned.abs().amax(1, keepdim=True) / 127).float()
        packed = {"weight": (turned / scale).round().to(torch.int8), "weight_scale": scale}
        errors[rotation] = relative(Int8Matmul(rotation).prepare(packed, None, torch.float32, None)(x), want)
    print(f"with an outlier of 100: {errors[0]:.4f}, rotated {errors[256]:.4f}")
    assert errors[256] < errors[0] / 3


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_orthogonal_and_its_own_inverse(size: int) -> None:
    matrix = rotation_matrix(size, CPU)
    torch.testing.assert_close(matrix.double(), hadamard(size))
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))


def test_a_product_is_chosen_on_a_cpu() -> None:
    assert select_int8_gemm(CPU, TorchRowOps()).name == "int8, then scaled"


# --- 4-bit formats ---------------------------------------------------------------------------------------


def four_bit_file(plain: Path, path: Path, name: str) -> Path:
    """A file that says it holds `name`; its numbers mean nothing."""
    tensors = load_file(plain)
    out = others(tensors)
    marker = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    for full, tensor in tensors.items():
        if is_quantised(full, tensor):
            layer, (rows, columns) = full.removesuffix(".weight"), tensor.shape
            quant = KITCHEN_QUANTS[name]
            out[full] = torch.zeros(rows, columns // 2 if quant.halved else columns, dtype=torch.uint8)
            out |= {f"{layer}.{part}": torch.ones(rows, columns // 16, dtype=torch.uint8) for part in quant.needs}
            out[f"{layer}.comfy_quant"] = marker.clone()
    save_file(out, path)
    return path


@pytest.mark.parametrize("name", KITCHEN_QUANTS)
def test_comfyui_formats_are_recognised_and_refused_without_its_package(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = four_bit_file(plain, tmp_path / "four.safetensors", name)
    config, checkpoint = open_wan(path)
    assert config.ffn_dim == 192
    assert checkpoint.tensors["blocks.0.ffn.2.weight"].logical_shape == (128, 192)
    find = importlib.util.find_spec
    installed = [False]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: installed[0] or None if name == "comfy_kitchen" else find(name)
    )
    with pytest.raises(
        CheckpointError, match=r"comfy-kitchen.*pip install comfy-kitchen.*fp8 scaled or a GGUF"
    ) as error:
        build_wan(config, checkpoint)
    print(error.value)
    installed[0] = True
    monkeypatch.setitem(sys.modules, "comfy_kitchen", ModuleType("comfy_kitchen"))
    model = build_wan(config, checkpoint)
    layer = model.blocks[0].ffn[0]
    assert isinstance(layer.format, KitchenFormat)
    assert layer.scratch_elements(torch.bfloat16) == 192 * 128


@pytest.mark.skipif(importlib.util.find_spec("comfy_kitchen") is None, reason="needs comfy-kitchen")
def test_comfy_kitchen_unpacks_its_formats() -> None:
    import comfy_kitchen as kitchen

    weight = rand(128, 512) / 16
    amax = weight.abs().max() / (448 * 6)
    four, blocks = kitchen.quantize_nvfp4(weight.bfloat16(), amax)
    eight, powers = kitchen.quantize_mxfp8(weight.bfloat16())
    rotated, scales = kitchen.quantize_convrot_w4a4_weight(weight.bfloat16())
    w4a8 = kitchen.quantize_w4a8_int8_weight(weight.bfloat16())
    packed = {
        "nvfp4": {"weight": four, "weight_scale": blocks, "weight_scale_2": amax},
        "mxfp8": {"weight": eight, "weight_scale": powers},
        "convrot_w4a4": {"weight": rotated, "weight_scale": scales},
        "asym_w4a8_int8": {
            "weight": w4a8[0],
            "weight_s_rel": w4a8[1],
            "weight_s_channel": w4a8[2],
            "weight_codebook": w4a8[4],
        },
    }
    for name, tensors in packed.items():
        got = KitchenFormat(KITCHEN_QUANTS[name]).dequantize(tensors, torch.float32)
        print(f"{name}: {relative(got, weight):.3f}")
        assert relative(got, weight) < 0.2
        stored = {leaf: info_of(leaf, tensor) for leaf, tensor in tensors.items()}
        check_needs(KITCHEN_QUANTS[name], stored)


def info_of(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path("m.safetensors"), 0, tensor.nbytes)


def check_needs(quant: KitchenQuant, stored: dict[str, TensorInfo]) -> None:
    """What the package made is taken; without any part of it, or with others, it is refused before it is unpacked."""
    weight = stored["weight"]
    assert quant.problem(weight, stored) is None
    for name in quant.needs:
        problem = quant.problem(weight, {leaf: info for leaf, info in stored.items() if leaf != name})
        assert problem == f"without its {name}"
    assert "and not in bytes" in str(quant.problem(replace(weight, dtype=torch.float32), stored))
    if quant.block:
        short = replace(stored["weight_scale"], shape=(1,))
        assert "which are not one byte for every" in str(quant.problem(weight, {**stored, "weight_scale": short}))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "convrot_w4a4", "asym_w4a8_int8"])
def test_a_marker_without_what_its_format_has_is_refused(tmp_path: Path, kind: str) -> None:
    """Before anything runs: the package itself would fail with a KeyError as the layer is unpacked."""
    path, layer = save_wan(tmp_path / "wan.safetensors"), "blocks.0.ffn.0"
    marker = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    save_file({**load_file(path), f"{layer}.comfy_quant": marker}, path)
    with pytest.raises(CheckpointError, match=rf"wan\.safetensors: {layer}\.weight .* is stored as '?{kind}'? without"):
        open_wan(path)


@pytest.mark.skipif(importlib.util.find_spec("comfy_kitchen") is None, reason="needs comfy-kitchen")
@pytest.mark.parametrize("rotation", [0, 256])
def test_comfy_kitchen_multiplies_as_we_do(rotation: int) -> None:
    x, bias = rand(40, 256), rand(48, seed=2)
    weight = torch.randint(-127, 128, (48, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    packed = {"weight": weight, "weight_scale": rand(48, 1, seed=5).abs() / 100}
    theirs, ours = (
        form.prepare(packed, bias, torch.float32, None)(x) for form in (KitchenInt8(rotation), Int8Matmul(rotation))
    )
    print(f"rotation {rotation}: {relative(ours, theirs):.1e}")
    assert relative(ours, theirs) < 1e-3
