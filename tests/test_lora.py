"""LoRAs: every naming of the files, beside the weights, against merging by hand and diffusers."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.checkpoint import official_names
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.kernels.gguf_reference import dequantize_reference
from lowvram_video.weights.kernels.low_rank_reference import TORCH
from lowvram_video.weights.linear.formats import assign_formats
from lowvram_video.weights.linear.linear import Linear, project_together
from lowvram_video.weights.linear.projection import Scratch
from lowvram_video.weights.lora import attach
from lowvram_video.weights.lora.attach import AttachedLoras
from lowvram_video.weights.lora.file import LoraChoice, open_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from .loras import (
    AB,
    ATTENTION,
    CPU,
    DIALECTS,
    DIM,
    DOWN_UP,
    FFN,
    INPUTS,
    LAYERS,
    Factors,
    diffusers_name,
    error_of,
    make_factors,
    merged_by_hand,
    rand,
    save_lora,
    save_merged,
    start,
    velocity,
)
from .quantizers import quantize, write_gguf
from .test_gguf import save_wan as save_gguf
from .tiny import CONFIGS, randomize, save_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors")


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_naming_gives_what_merging_by_hand_gives(wan: Path, tmp_path: Path, dialect: str) -> None:
    factors = make_factors()
    lora = save_lora(tmp_path / "lora.safetensors", factors, dialect)
    model = StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora)])
    report = model.weights.loras.loras[0].report
    assert (report.num_applied, report.num_keys) == (90, 90)
    got = velocity(wan, LoraChoice(lora, 0.7))
    want = velocity(save_merged(wan, tmp_path / "merged.safetensors", factors, 0.7))
    plain = velocity(wan)
    error = error_of(got, want)
    print(f"{dialect}: relative error {error:.1e} (the LoRA changes {error_of(want, plain):.2f})")
    assert error < 1e-5 < 1e-2 < error_of(want, plain)
    reference = save_lora(tmp_path / "official.safetensors", factors, "official")
    assert torch.equal(got, velocity(wan, LoraChoice(reference, 0.7)))


@pytest.mark.parametrize("dialect", ["diffusers", "diffusers, underscored", "musubi"])
@pytest.mark.parametrize("layer", ATTENTION)
def test_each_attentions_keys_land_where_they_belong(wan: Path, tmp_path: Path, layer: str, dialect: str) -> None:
    factors = make_factors(layers=[f"blocks.1.{layer}"])
    lora = save_lora(tmp_path / "lora.safetensors", factors, dialect)
    model = StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora)])
    changed = {name for name, module in model.model.named_modules() if "lora_down" in module._parameters}
    assert changed == {f"blocks.1.{layer}"}


def test_diffusers_with_merged_weights_equals_ours_with_the_file(tmp_path: Path) -> None:
    config = CONFIGS["t2v"]
    torch.manual_seed(0)
    reference = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=DIM, text_dim=32, freq_dim=32, ffn_dim=FFN, num_layers=3
    )
    randomize(reference)
    reference.requires_grad_(False)
    names = official_names(reference.state_dict())
    path = tmp_path / "wan.safetensors"
    save_file({names[name]: tensor.contiguous() for name, tensor in reference.state_dict().items()}, path)
    factors = make_factors(rank=8, alpha=4.0)
    lora = save_lora(tmp_path / "lora.safetensors", factors, "diffusers")
    for layer, (down, up, alpha) in factors.items():
        assert alpha is not None
        reference.get_submodule(diffusers_name(layer)).weight += alpha / 8 * up @ down
    with torch.inference_mode():
        latent, timestep, text = INPUTS
        want = reference(latent, timestep, text, return_dict=False)[0]
    got = velocity(path, LoraChoice(lora))
    error = error_of(got, want)
    print(f"{config.model_type} of diffusers, its weights merged: relative error {error:.1e}")
    assert error < 1e-5


def test_no_alpha_is_a_scale_of_one(wan: Path, tmp_path: Path) -> None:
    without = save_lora(tmp_path / "a.safetensors", make_factors(rank=4, alpha=None))
    as_rank = save_lora(tmp_path / "b.safetensors", make_factors(rank=4, alpha=4.0))
    assert torch.equal(velocity(wan, LoraChoice(without)), velocity(wan, LoraChoice(as_rank)))


def test_what_is_not_applied_is_named(wan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    down, up = torch.zeros(4, DIM), torch.zeros(DIM, 4)
    odd = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": down,
        "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": up,
        "diffusion_model.blocks.2.norm3.lora_A.weight": down,
        "diffusion_model.blocks.7.self_attn.q.alpha": torch.tensor(1.0),
        "diffusion_model.blocks.0.self_attn.q.hada_w1_a": up,
        "diffusion_model.patch_embedding.lora_A.weight": torch.zeros(4, 36, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_B.weight": torch.zeros(DIM, 4, 1, 1, 1),
    }
    lora = save_lora(tmp_path / "lora.safetensors", make_factors(), "ComfyUI", **odd)
    with caplog.at_level(logging.INFO):
        model = StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora)])
    report = model.weights.loras.loras[0].report
    assert (report.num_applied, report.num_keys) == (90, 97) and report.skipped.keys() == odd.keys()
    text = str(report)
    print(text)
    assert text.startswith("lora.safetensors: 90 of 97 keys applied; not applied: ")
    for part in (*odd, "no such layer", "half of a pair", "144 to 128 features, the model has 64 to 128"):
        assert part in text
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [f"LoRA {text}"]


FLUX = {f"lora_unet_double_blocks_{n}_img_attn_proj.{end}": torch.zeros(4, 4) for n in range(6) for end in DOWN_UP}
REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], list[str]]] = {
    "another size": (
        lambda: {
            f"diffusion_model.blocks.{n}.self_attn.q.{end}": tensor
            for n in range(3)
            for end, tensor in zip(AB, (torch.zeros(4, 64), torch.zeros(64, 4)), strict=True)
        },
        ["a LoRA of another model: 3 of its layers differ", "64 to 64 features, the model has 128 to 128"],
    ),
    "Flux": (lambda: FLUX, ["a LoRA of another model", "lora_unet_double_blocks_0_img_attn_proj", "no such layer"]),
    "a model": (lambda: {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, ["no LoRA", "blocks.0.self_attn.q.weight"]),
    "half of a LoKr": (
        lambda: {"lora_unet_blocks_0_ffn_0.lokr_w1": torch.zeros(2, 2)},
        ["a LoRA of another model", "half of a LoKr"],
    ),
    "half of a LoHa": (
        lambda: {
            "lora_unet_blocks_0_ffn_0.hada_w1_a": torch.zeros(2, 2),
            "lora_unet_blocks_0_ffn_0.alpha": torch.tensor(1.0),
        },
        ["a LoRA of another model", "half of a LoHa"],
    ),
    "one alpha": (
        lambda: {"blocks.0.ffn.0.alpha": torch.tensor(1.0)},
        ["a LoRA of another model", "half of a pair"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_lora_of_another_model_is_refused_in_a_sentence(wan: Path, tmp_path: Path, kind: str) -> None:
    tensors, words = REFUSED[kind]
    save_file(tensors(), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        StreamedWan(wan, RunSettings(), loras=[LoraChoice(tmp_path / "lora.safetensors")])
    print(refusal.value)
    for word in ("lora.safetensors", "expected", "choose", *words):
        assert word in str(refusal.value)


def test_a_lora_of_an_image_model_works_on_a_text_model(tmp_path: Path) -> None:
    """Layers that only the other has are left out; those that it was made for get it."""
    i2v = save_wan(tmp_path / "i2v.safetensors", "i2v clip")
    extra = [f"blocks.{n}.cross_attn.{layer}" for n in range(3) for layer in ("k_img", "v_img")]
    lora = save_lora(tmp_path / "lora.safetensors", make_factors(layers=LAYERS + extra))
    on_image = StreamedWan(i2v, RunSettings(), loras=[LoraChoice(lora)]).weights.loras.loras[0].report
    text_model = save_wan(tmp_path / "t2v.safetensors")
    on_text = StreamedWan(text_model, RunSettings(), loras=[LoraChoice(lora)]).weights.loras.loras[0].report
    assert (on_image.num_applied, on_text.num_applied, on_text.num_keys) == (108, 90, 108)


# --- exactness -------------------------------------------------------------------------------------------


def test_beside_the_weights_is_merged_within_rounding(wan: Path, tmp_path: Path) -> None:
    factors = make_factors(rank=16)
    lora = LoraChoice(save_lora(tmp_path / "lora.safetensors", factors), 0.8)
    beside, merged = velocity(wan, lora), velocity(wan, lora, settings=RunSettings(lora_mode="merge"))
    by_hand = velocity(save_merged(wan, tmp_path / "hand.safetensors", factors, 0.8))
    errors = error_of(beside, by_hand), error_of(merged, by_hand)
    print(f"fp32: beside {errors[0]:.1e}, merged {errors[1]:.1e} of merging by hand")
    assert max(errors) < 1e-5

    half = RunSettings(dtype=torch.bfloat16)
    wan16 = save_wan(tmp_path / "bf16.safetensors", dtype=torch.bfloat16)
    exact = velocity(save_merged(wan16_as_fp32(wan16, tmp_path), tmp_path / "exact.safetensors", factors, 0.8))
    rounding = error_of(
        velocity(save_merged(wan16, tmp_path / "hand16.safetensors", factors, 0.8), settings=half), exact
    )
    beside, merged = (
        velocity(wan16, lora, settings=half),
        velocity(wan16, lora, settings=replace(half, lora_mode="merge")),
    )
    errors = error_of(beside, exact), error_of(merged, exact)
    print(f"bf16 against fp32: beside {errors[0]:.1e}, merged {errors[1]:.1e}, merged by hand {rounding:.1e}")
    assert max(errors) < 1.5 * rounding


def wan16_as_fp32(path: Path, folder: Path) -> Path:
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, folder / "wide.safetensors")
    return folder / "wide.safetensors"


QUANTIZED = [
    RunSettings(),
    RunSettings(dtype=torch.bfloat16),
    RunSettings(quantization="fp8"),
    RunSettings(quantization="fp8_fast"),
    RunSettings(quantization="int8"),
    RunSettings(lora_mode="merge"),
    RunSettings(lora_mode="merge", quantization="fp8"),
    RunSettings(lora_mode="merge", quantization="int8"),
]


@pytest.mark.parametrize("settings", QUANTIZED, ids=lambda s: f"{s.lora_mode} {s.quantization} {s.dtype}")
def test_strength_zero_is_no_lora_bit_for_bit(wan: Path, tmp_path: Path, settings: RunSettings) -> None:
    lora = save_lora(tmp_path / "lora.safetensors", make_factors())
    plain = velocity(wan, settings=settings)
    assert torch.equal(velocity(wan, LoraChoice(lora, 0.0), settings=settings), plain)
    assert not torch.equal(velocity(wan, LoraChoice(lora, 0.5), settings=settings), plain)


@pytest.mark.parametrize(("quantization", "bound"), [("fp8", 3e-5), ("fp8_fast", 1.2), ("int8", 1.2)])
def test_loras_on_quantised_weights(wan: Path, tmp_path: Path, quantization: str, bound: float) -> None:
    """Beside 8-bit products a LoRA adds no error of its own; into unpacked weights it is folded exactly."""
    factors = make_factors(rank=16)
    lora = LoraChoice(save_lora(tmp_path / "lora.safetensors", factors))
    settings = RunSettings(quantization=quantization)
    got = velocity(wan, lora, settings=settings)
    if quantization == "fp8":
        want = velocity(unpacked_and_merged(wan, tmp_path, factors, settings))
        error = error_of(got, want)
        print(f"fp8, folded: relative error {error:.1e} of unpacking and merging by hand")
        assert error < bound
        return
    exact = velocity(save_merged(wan, tmp_path / "hand.safetensors", factors))
    alone = error_of(velocity(wan, settings=settings), velocity(wan))
    error = error_of(got, exact)
    print(f"{quantization}, beside: relative error {error:.1e}; the model without LoRA has {alone:.1e}")
    assert error < bound * alone


def unpacked_and_merged(wan: Path, folder: Path, factors: Factors, settings: RunSettings) -> Path:
    model = start(StreamedWan(wan, settings)).model
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("weight_scale")}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            tensors[f"{name}.weight"] = module.format.dequantize(module.packed(), torch.float32)
    save_file(
        merged_by_hand({name: tensor.clone() for name, tensor in tensors.items()}, factors), folder / "u.safetensors"
    )
    return folder / "u.safetensors"


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K"])
def test_folding_into_gguf_is_unpacking_and_merging(tmp_path: Path, quant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = quantize(torch.randn(96, 256, generator=generator), quant)
    weight = dequantize_reference(packed, quant, (96, 256))
    path = write_gguf(tmp_path / "layer.gguf", {"layer.weight": (packed, quant)})
    down, up = torch.randn(12, 256, generator=generator) / 16, torch.randn(96, 12, generator=generator)
    save_file({"layer.lora_A.weight": down, "layer.lora_B.weight": up}, tmp_path / "lora.safetensors")
    layer, attached = linear_with(path, [LoraChoice(tmp_path / "lora.safetensors", 0.6)])
    x = torch.randn(7, 256, generator=generator)
    scratch = Scratch(CPU, torch.float32, weight.numel())
    with torch.inference_mode():
        got = layer.prepare(torch.float32, scratch)(x)
        assert scratch.used == weight.numel()
        want = torch.nn.functional.linear(x, weight + 0.6 * up @ down)
        assert torch.equal(layer.prepare(torch.float32, scratch)(x), got)  # unpacked afresh, not added twice
        attached.set_strengths([0.0])
        scratch.reset()
        assert torch.equal(layer.prepare(torch.float32, scratch)(x), torch.nn.functional.linear(x, weight))
    print(f"{quant}: relative error {error_of(got, want):.1e}")
    assert error_of(got, want) < 1e-5


def test_a_wan_gguf_with_a_lora_is_the_dense_model_with_merged_weights(tmp_path: Path) -> None:
    path, dense = save_gguf(tmp_path / "wan.gguf", "Q8_0")
    down, up = rand(1, 4, 256), rand(2, 256, 4)
    layers = [f"blocks.{n}.{layer}" for n in range(2) for layer in ("self_attn.v", "cross_attn.o")]
    lora = save_lora(tmp_path / "lora.safetensors", {layer: (down * 4, up * 4, None) for layer in layers})
    with torch.inference_mode():
        latent, timestep, text = INPUTS[0][..., :4], INPUTS[1], rand(3, 1, 8, 256)
        plain = dense(latent, timestep, text)
        for layer in layers:
            dense.get_submodule(layer).weight += 16 * up @ down
        want = dense(latent, timestep, text)
        got = start(StreamedWan(path, RunSettings(), loras=[LoraChoice(lora)]), 2)(latent, timestep, text)
    print(f"Q8_0 Wan: relative error {error_of(got, want):.1e} (the LoRA changes {error_of(want, plain):.3f})")
    assert error_of(got, want) < 1e-5 < 1e-3 < error_of(want, plain)


def linear_with(path: Path, choices: list[LoraChoice]):
    """A single layer of a file, with LoRAs."""
    checkpoint = open_checkpoint(path)
    shape = checkpoint.tensors["layer.weight"].logical_shape or checkpoint.tensors["layer.weight"].shape
    model = torch.nn.ModuleDict({"layer": Linear(shape[1], shape[0], bias=False, device="meta")})
    assign_formats(model, checkpoint)
    loras = [open_lora(choice.path, checkpoint.tensors, {"layer": "layer"}) for choice in choices]
    attached = AttachedLoras(model, checkpoint, loras, [choice.strength for choice in choices], torch.float32)
    source = attached.source()
    for name in list(model.state_dict()):
        info = source.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        source.read_into(name, raw)
        parameter = torch.nn.Parameter(raw.view(info.dtype).view(info.shape), requires_grad=False)
        model["layer"].register_parameter(name.rpartition(".")[2], parameter)
    return model["layer"], attached


def test_two_loras_together_are_one_after_the_other(wan: Path, tmp_path: Path) -> None:
    first, second = make_factors(0, 4), make_factors(1, 6, LAYERS[5:], alpha=3.0)
    choices = [
        LoraChoice(save_lora(tmp_path / "1.safetensors", first), 0.7),
        LoraChoice(save_lora(tmp_path / "2.safetensors", second, "musubi"), -0.4),
    ]
    model = StreamedWan(wan, RunSettings(), loras=choices)
    both = model.model.blocks[2].ffn[0]
    assert both.lora_down.shape == (10, DIM) and both.lora_up.shape == (FFN, 10)
    half_way = save_merged(wan, tmp_path / "half.safetensors", first, 0.7)
    want = velocity(save_merged(half_way, tmp_path / "both.safetensors", second, -0.4))
    in_turn = velocity(half_way, choices[1])
    got = velocity(wan, *choices)
    print(f"two LoRAs: {error_of(got, want):.1e} of both merged, {error_of(got, in_turn):.1e} of one beside the other")
    assert error_of(got, want) < 1e-5 and error_of(got, in_turn) < 1e-5
    assert torch.equal(velocity(wan, replace(choices[0], strength=0.0), choices[1]), velocity(wan, choices[1]))


def test_a_strength_changes_in_its_place(wan: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora.safetensors", make_factors())
    model = start(StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora, 1.0)]))
    source, block = model.weights.blocks, model.model.blocks[0]

    def places() -> list[int]:
        layer = block.ffn[0]
        return [tensor.data_ptr() for tensor in (layer.weight, layer.lora_up, layer.lora_down, layer.lora_scale)]

    with torch.inference_mode():
        at_one, before = model(*INPUTS), places()
        model.set_lora_strengths([0.25])
        at_quarter = model(*INPUTS)
        assert places() == before and model.weights.blocks is source
        model.set_lora_strengths([1.0])
        assert torch.equal(model(*INPUTS), at_one)
    model.release()
    assert torch.equal(at_quarter, velocity(wan, LoraChoice(lora, 0.25)))
    with pytest.raises(ValueError, match="2 strengths for 1 LoRAs"):
        model.set_lora_strengths([1.0, 2.0])


def test_what_runs_beside_layers_is_chosen_once_for_all(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the device is short of memory each choice is made anew, with all its trials."""
    lora, calls = save_lora(tmp_path / "lora.safetensors", make_factors()), []
    monkeypatch.setattr(attach, "select_low_rank_ops", lambda device: calls.append(device) or TORCH)
    model = StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora, 1.0)])
    calls.clear()
    start(model).release()
    assert calls == [CPU]


def test_another_strength_of_a_merged_lora_is_read_again(wan: Path, tmp_path: Path) -> None:
    lora, settings = save_lora(tmp_path / "lora.safetensors", make_factors()), RunSettings(lora_mode="merge")
    model = start(StreamedWan(wan, settings, loras=[LoraChoice(lora, 1.0)]))
    model.set_lora_strengths([0.5])
    with torch.inference_mode():
        got = start(model)(*INPUTS)
    assert torch.equal(got, velocity(wan, LoraChoice(lora, 0.5), settings=settings))


def test_a_strength_makes_no_code_anew(wan: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora.safetensors", make_factors())
    model = start(StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora, 1.0)]))
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(lambda layer, x: layer.prepare(x.dtype)(x), backend=backend, fullgraph=True)
    x, layers = torch.randn(5, DIM), [block.self_attn.q for block in model.model.blocks]
    with torch.inference_mode():
        for strength in (1.0, 0.3, 0.0):
            model.set_lora_strengths([strength])
            for layer in layers:
                assert torch.allclose(run(layer, x), layer(x), atol=1e-6)
    assert len(compiled) == 1


def test_layers_that_share_rows_quantise_them_once(wan: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora.safetensors", make_factors())
    model = start(StreamedWan(wan, RunSettings(quantization="int8"), loras=[LoraChoice(lora)]))
    attn = model.model.blocks[0].self_attn
    projections = [layer.prepare(torch.float32) for layer in (attn.q, attn.k, attn.v)]
    assert len({project.form for project in projections}) == 1
    x, outs = torch.randn(9, DIM), [torch.empty(9, DIM) for _ in range(3)]
    project_together(projections, x, outs)
    for project, out in zip(projections, outs, strict=True):
        # fp32 sums in another order: together, the LoRAs of the three are one product
        torch.testing.assert_close(project(x), out, rtol=1e-5, atol=1e-5)
        assert torch.equal(project(x.view(3, 3, DIM)).view(9, DIM), project(x))
