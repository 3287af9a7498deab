"""weights/linear/fp8.py, dialects.py and rows.py: every way of storing scaled fp8, and both ways of multiplying it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowvram_video.wanvideo.checkpoint import build_wan, open_wan
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.kernels.gemms import Fp8Rescaled, Fp8Rowwise, ReferenceGemm, gemm_error, select_fp8_gemm
from lowvram_video.weights.kernels.row_reference import TorchRowOps
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.linear.fp8 import Fp8Dequantized, Fp8Matmul
from lowvram_video.weights.linear.linear import project_together
from lowvram_video.weights.linear.projection import Scratch
from lowvram_video.weights.linear.weight_format import Plain
from safetensors.torch import load_file, save_file
from torch import Tensor

from .tiny import load_wan, save_wan

CPU = torch.device("cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Tensors = dict[str, Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_quantised(name: str, tensor: Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2


def scaled(tensors: Tensors, per_row: bool = False, dtype: torch.dtype = E4M3) -> tuple[dict[str, tuple], Tensors]:
    """(values, scale) by layer, and the weights that they stand for: plain arithmetic, nothing of ours."""
    layers, truth = {}, dict(tensors)
    for name, tensor in tensors.items():
        if is_quantised(name, tensor):
            amax = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()
            scale = (amax / torch.finfo(dtype).max).float()
            values = (tensor / scale).to(dtype)
            layers[name.removesuffix(".weight")] = values, scale
            truth[name] = (values.double() * scale.double()).float()
    return layers, truth


def others(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not is_quantised(name, tensor)}


# Each writes one dialect: (all tensors, scaled layers) -> (tensors of the file, its metadata).


def kijai(tensors: Tensors, layers: dict, num_elements: int = 0) -> tuple[Tensors, dict[str, str]]:
    out = others(tensors)
    for layer, (values, scale) in layers.items():
        out |= {f"{layer}.weight": values, f"{layer}.scale_weight": scale}
    return {**out, "scaled_fp8": torch.zeros(num_elements, dtype=E4M3)}, {}


def kijai_full_precision(tensors: Tensors, layers: dict) -> tuple[Tensors, dict[str, str]]:
    return kijai(tensors, layers, 2)


def repackaged_old(tensors: Tensors, layers: dict) -> tuple[Tensors, dict[str, str]]:
    out, _ = kijai(tensors, layers)
    out |= {f"{layer}.scale_input": torch.tensor(0.5) for layer in layers}
    return {"model.diffusion_model." + name: tensor for name, tensor in out.items()}, {}


def comfy_quant(tensors: Tensors, layers: dict, full: bool = False) -> tuple[Tensors, dict[str, str]]:
    out = others(tensors)
    text = json.dumps({"format": "float8_e4m3fn", **({"full_precision_matrix_mult": True} if full else {})}).encode()
    for layer, (values, scale) in layers.items():
        out |= {f"{layer}.weight": values, f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor([2.0])}
        out[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return out, {}


def comfy_quant_full_precision(tensors: Tensors, layers: dict) -> tuple[Tensors, dict[str, str]]:
    return comfy_quant(tensors, layers, True)


def header(tensors: Tensors, layers: dict) -> tuple[Tensors, dict[str, str]]:
    prefix = "model.diffusion_model."
    out, _ = comfy_quant(tensors, layers)
    out = {prefix + name: tensor for name, tensor in out.items() if not name.endswith(".comfy_quant")}
    fields = {prefix + layer: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True} for layer in layers}
    return out, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": fields})}


def lightx2v(tensors: Tensors, layers: dict) -> tuple[Tensors, dict[str, str]]:
    out = others(tensors)
    for layer, (values, scale) in layers.items():
        out |= {f"{layer}.weight": values, f"{layer}.weight_scale": scale}
    return out, {}


# dialect -> (writer, scales per row, number format, whether the file asks for full precision)
DIALECTS: dict[str, tuple[Callable, bool, torch.dtype, bool]] = {
    "scale_weight, marker": (kijai, False, E4M3, False),
    "scale_weight, marker of two": (kijai_full_precision, False, E4M3, True),
    "scale_weight, scale_input, prefix": (repackaged_old, False, E4M3, False),
    "scale_weight, e5m2": (kijai, False, E5M2, False),
    "comfy_quant": (comfy_quant, False, E4M3, False),
    "comfy_quant, full precision": (comfy_quant_full_precision, False, E4M3, True),
    "header, prefix": (header, False, E4M3, True),
    "weight_scale per row": (lightx2v, True, E4M3, False),
}


def output(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(rand(1, 16, 2, 4, 4), torch.tensor([500.0]), rand(1, 512, 32, seed=1))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("fp8") / "wan.safetensors")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_gives_the_weights_it_stands_for(dialect: str, plain: Path, tmp_path: Path) -> None:
    write, per_row, dtype, full = DIALECTS[dialect]
    tensors = load_file(plain)
    layers, truth = scaled(tensors, per_row, dtype)
    stored, metadata = write(tensors, layers)
    path = tmp_path / "quantised.safetensors"
    save_file(stored, path, metadata)
    model = load_wan(path)
    for layer in layers:
        module = model.get_submodule(layer)
        assert isinstance(module.format, Fp8Dequantized)
        assert module.format.full_precision == full
        got = module.format.dequantize(module.packed(), torch.float32)
        torch.testing.assert_close(got, truth[f"{layer}.weight"], rtol=1e-6, atol=0)
    save_file(truth, tmp_path / "truth.safetensors")
    exact, near = output(load_wan(tmp_path / "truth.safetensors")), output(load_wan(plain))
    got = output(model)
    print(f"{dialect}: to the same weights {relative(got, exact):.1e}, to the original model {relative(got, near):.1e}")
    assert relative(got, exact) < 1e-6
    assert relative(got, near) < 0.1

    if full or dtype == E5M2:
        with pytest.raises(ValueError, match="no layer of this model can be multiplied in fp8"):
            select_compute(model, model.blocks, "fp8_fast", CPU)
    else:
        select_compute(model, model.blocks, "fp8_fast", CPU)
        assert all(isinstance(model.get_submodule(layer).format, Fp8Matmul) for layer in layers)
        assert relative(output(model), exact) < 0.1


def test_bare_casts_stay_plain_and_can_be_multiplied(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain)
    cast = {name: tensor.to(E4M3) if is_quantised(name, tensor) else tensor for name, tensor in tensors.items()}
    save_file(cast, tmp_path / "cast.safetensors")
    save_file({name: tensor.float() for name, tensor in cast.items()}, tmp_path / "truth.safetensors")
    model, exact = load_wan(tmp_path / "cast.safetensors"), output(load_wan(tmp_path / "truth.safetensors"))
    assert isinstance(model.blocks[0].ffn[0].format, Plain)
    assert relative(output(model), exact) < 1e-6
    select_compute(model, model.blocks, "fp8_fast", CPU)
    assert isinstance(model.blocks[0].ffn[0].format, Fp8Matmul)
    assert relative(output(model), exact) < 0.1
    select_compute(model, model.blocks, "none", CPU)
    assert relative(output(model), exact) < 1e-6


def test_the_streamed_model_has_the_stored_tensors(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain)
    stored, metadata = comfy_quant(tensors, scaled(tensors)[0])
    save_file(stored, tmp_path / "q.safetensors", metadata)
    config, checkpoint = open_wan(tmp_path / "q.safetensors")
    names = set(build_wan(config, checkpoint).state_dict())
    assert names == set(checkpoint.tensors)
    assert "blocks.0.ffn.0.weight_scale" in names
    assert not any(name.endswith(("comfy_quant", "input_scale")) for name in names)


# --- refusals --------------------------------------------------------------------------------------------


def test_markers_that_make_no_sense_are_refused(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain)
    layers, _ = scaled(tensors)
    stored, _ = comfy_quant(tensors, layers)
    name = "blocks.0.ffn.0.comfy_quant"
    cases = {
        b'{"format": "float3"}': "float3.*not known.*float8_e4m3fn",
        b"{nonsense": "no valid JSON",
        b"[1]": "no JSON object",
        b'{"bits": 8}': "lacks a format",
        b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 200}': "power of 4",
    }
    for text, message in cases.items():
        save_file({**stored, name: torch.tensor(list(text), dtype=torch.uint8)}, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=message) as error:
            open_wan(tmp_path / "bad.safetensors")
        print(error.value)
    misfit = {**stored, "blocks.0.ffn.0.weight_scale": torch.ones(5, 7)}  # no blocks of [192, 128]
    save_file(misfit, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="one number, or one for each row"):
        open_wan(tmp_path / "bad.safetensors")
    save_file(tensors, tmp_path / "bad.safetensors", {"_quantization_metadata": "{}"})
    with pytest.raises(CheckpointError, match="no table of layers"):
        open_wan(tmp_path / "bad.safetensors")
    lone = {**tensors, "blocks.0.ffn.0.weight_scale_2": torch.ones(1)}
    save_file(lone, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="quantised file"):
        build_wan(*open_wan(tmp_path / "bad.safetensors"))


def test_an_unknown_quantization_is_refused(plain: Path) -> None:
    model = load_wan(plain)
    with pytest.raises(ValueError, match="quantization is 'fp4'; expected one of none, fp8, fp8_fast, int8"):
        select_compute(model, model.blocks, "fp4", CPU)


# --- accuracy --------------------------------------------------------------------------------------------


def test_row_wise_scales_beat_scale_one_clamped() -> None:
    """Of Wan's block layers: activations with outliers and rows of very different size, as the modulated norms make."""
    errors: dict[str, list[float]] = {"dequantised": [], "rows": [], "scale 1, clamped": []}
    for seed, size in enumerate((0.01, 1.0, 30.0, 300.0)):
        x = rand(256, 512, seed=seed) * size * torch.exp(rand(256, 1, seed=seed + 9))
        x[:, 7] *= 20
        weight = rand(384, 512, seed=seed + 20) / 512**0.5
        want = x.double() @ weight.double().t()
        scale = weight.abs().amax(1, keepdim=True) / 448
        packed = {"weight": (weight / scale).to(E4M3), "weight_scale": scale}
        for name, form in (("dequantised", Fp8Dequantized()), ("rows", Fp8Matmul())):
            errors[name].append(relative(form.prepare(packed, None, torch.float32, None)(x), want))
        clamped = x.clamp(-448, 448).to(E4M3).double() @ (packed["weight"].double() * scale).t()
        errors["scale 1, clamped"].append(relative(clamped, want))
    print("relative error of a layer      activations of size 0.01, 1, 30, 300")
    for name, row in errors.items():
        print(f"{name:>20}: " + "  ".join(f"{error:.4f}" for error in row))
    assert all(ours < theirs for ours, theirs in zip(errors["rows"], errors["scale 1, clamped"], strict=True))
    assert max(errors["rows"]) < 0.04


def test_whole_model_errors(plain: Path, tmp_path: Path) -> None:
    want = output(load_wan(plain))
    tensors = load_file(plain)
    for per_row in (False, True):
        stored, _ = lightx2v(tensors, scaled(tensors, per_row)[0])
        save_file(stored, tmp_path / "q.safetensors")
        model = load_wan(tmp_path / "q.safetensors")
        slow = relative(output(model), want)
        select_compute(model, model.blocks, "fp8_fast", CPU)
        fast = relative(output(model), want)
        print(f"tiny Wan, scales per {'row' if per_row else 'tensor'}: fp8 {slow:.4f}, fp8_fast {fast:.4f}")
        assert slow < fast < 0.1


# --- arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gemm", (ReferenceGemm(), Fp8Rowwise(), Fp8Rescaled(TorchRowOps())), ids=lambda gemm: gemm.name
)
def test_products_agree_with_fp64(gemm: ReferenceGemm) -> None:
    try:
        gemm_error(gemm, E4M3, CPU)
    except RuntimeError as error:  # torch before 2.7 or so multiplies fp8 on a GPU only
        pytest.skip(str(error))
    x, weight, bias = rand(40, 96) * 3, rand(48, 96, seed=1), rand(48, seed=2)
    packed = {"weight": (weight * 50).to(E4M3), "weight_scale": rand(48, seed=3).abs() / 50}
    project = Fp8Matmul(gemm).prepare(packed, bias, torch.float32, None)
    rows = x.double() / (x.abs().amax(1, keepdim=True) / 448).double()
    values = rows.float().to(E4M3).double() * (x.abs().amax(1, keepdim=True) / 448).double()
    want = values @ (packed["weight"].double() * packed["weight_scale"].double()[:, None]).t() + bias
    out = torch.full((40, 48), torch.nan)
    assert project(x, out=out) is out
    error = relative(out, want)
    print(f"{gemm.name}: {error:.1e}")
    assert error < 2e-3  # a few values lie so close to a boundary that fp32 rounds them the other way
    torch.testing.assert_close(project(x.view(2, 20, 96)), out.view(2, 20, 48))


def test_the_first_product_that_works_is_chosen_on_a_cpu() -> None:
    assert select_fp8_gemm(CPU, TorchRowOps()).name in ("fp8 row-wise", "reference")


def test_layers_of_one_input_share_its_quantised_rows() -> None:
    x = rand(20, 32)

    class Counting(TorchRowOps):
        calls = 0

        def quantize(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return super().quantize(x, dtype)

    ops = Counting()
    form = Fp8Matmul(ops=ops)
    packed = [{"weight": rand(16, 32, seed=i).to(E4M3)} for i in range(3)]
    projections = [form.prepare(each, None, torch.float32, None) for each in packed[:2]]
    projections.append(Plain().prepare(packed[2], None, torch.float32, None))
    outs = [torch.empty(20, 16) for _ in range(3)]
    project_together(projections, x, outs)
    assert ops.calls == 1
    for project, out in zip(projections, outs, strict=True):
        torch.testing.assert_close(out, project(x))


def test_unpacking_takes_scratch_and_rounds_once() -> None:
    weight, scale = rand(24, 40).to(E4M3), rand(24, 1).abs() + 0.1
    scratch = Scratch(CPU, torch.bfloat16, 24 * 40)
    packed = {"weight": weight, "weight_scale": scale}
    form = Fp8Dequantized()
    assert form.scratch_elements(packed, torch.bfloat16) == 24 * 40
    project = form.prepare(packed, None, torch.bfloat16, scratch)
    assert project.weight.data_ptr() == scratch.buffer.data_ptr()
    assert torch.equal(project.weight, (weight.float() * scale).bfloat16())


def test_zero_and_huge_rows_survive_quantising() -> None:
    x = torch.stack([torch.zeros(32), torch.full((32,), 3e38), rand(32) * 1e-30])
    for dtype, largest in ((torch.float8_e4m3fn, 448), (torch.int8, 127)):
        values, scales = TorchRowOps().quantize(x, dtype)
        assert torch.isfinite(values.float()).all() and torch.isfinite(scales).all()
        assert float(values.float().abs().max()) == largest
