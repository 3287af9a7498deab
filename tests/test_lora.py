"""LoRAs: every naming of the files, beside the weights or merged into them, against merging by hand and diffusers."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from lowvram_video.cli import main, make_parser
from lowvram_video.memory.disk_blocks import DiskBlocks
from lowvram_video.memory.footprint import Limits, WorkSize
from lowvram_video.memory.host_buffers import HostBlocks
from lowvram_video.memory.ladder import RAM_MARGIN_BYTES
from lowvram_video.memory.ring import DeviceRing
from lowvram_video.wanvideo.checkpoint import load_wan, official_names
from lowvram_video.wanvideo.model import WanModel
from lowvram_video.wanvideo.pipeline import WanFiles, WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.dialects import plain_dialect
from lowvram_video.weights.formats import assign_formats
from lowvram_video.weights.gguf_reference import dequantize_reference
from lowvram_video.weights.linear import Linear, Scratch, project_together
from lowvram_video.weights.lora import LoraChoice, open_lora
from lowvram_video.weights.lora_merge import decomposed
from lowvram_video.weights.lora_source import AttachedLoras
from lowvram_video.weights.reader import CheckpointError, open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from .quantizers import quantize, write_gguf
from .test_gguf import save_wan as save_gguf
from .tiny import CONFIGS, randomize, save_files, save_wan

CPU = torch.device("cpu")
DIM, FFN = 128, 192
UNLIMITED = 1 << 60
Factors = dict[str, tuple[Tensor, Tensor, float | None]]  # layer -> down, up, alpha

ATTENTION = [f"{attn}.{layer}" for attn in ("self_attn", "cross_attn") for layer in "qkvo"]
LAYERS = [f"blocks.{n}.{layer}" for n in range(3) for layer in [*ATTENTION, "ffn.0", "ffn.2"]]

# written out, not taken from the code under test
DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip


def diffusers_name(layer: str) -> str:
    blocks, number, inner = layer.split(".", 2)
    return f"{blocks}.{number}.{DIFFUSERS[inner]}"


AB = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
DIALECTS: dict[str, tuple[Callable[[str], str], tuple[str, str]]] = {
    "official": (lambda layer: layer, AB),
    "ComfyUI": (lambda layer: f"diffusion_model.{layer}", AB),
    "LightX2V": (lambda layer: f"diffusion_model.{layer}", DOWN_UP),
    "musubi": (lambda layer: f"lora_unet_{layer.replace('.', '_')}", DOWN_UP),
    "two underscores": (lambda layer: f"lora_unet__{layer.replace('.', '_')}", DOWN_UP),
    "diffusers": (lambda layer: f"transformer.{diffusers_name(layer)}", AB),
    "diffusers, old": (lambda layer: f"transformer.{diffusers_name(layer)}", ("lora.down.weight", "lora.up.weight")),
    "diffusers, underscored": (lambda layer: f"lora_unet_{diffusers_name(layer).replace('.', '_')}", DOWN_UP),
    "PEFT": (lambda layer: f"base_model.model.{layer}", AB),
    "PEFT, named": (lambda layer: f"base_model.model.{layer}", DEFAULT),
    "PEFT in ComfyUI": (lambda layer: f"base_model.model.diffusion_model.{layer}", AB),
    "DiffSynth": (lambda layer: f"pipe.dit.{layer}", DEFAULT),
}


def make_factors(seed: int = 0, rank: int = 4, layers: list[str] = LAYERS, alpha: float | None = 2.0) -> Factors:
    """Random factors whose product is as large as a tenth of the tiny models' weights."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    for layer in layers:
        inner, outer = (FFN if layer.endswith("ffn.2") else DIM), (FFN if layer.endswith("ffn.0") else DIM)
        down = torch.randn(rank, inner, generator=generator) * 0.3 / inner**0.5
        factors[layer] = down, torch.randn(outer, rank, generator=generator) * 0.3, alpha
    return factors


def save_lora(path: Path, factors: Factors, dialect: str = "ComfyUI", **more: Tensor) -> Path:
    name, (down_end, up_end) = DIALECTS[dialect]
    tensors: dict[str, Tensor] = {}
    for layer, (down, up, alpha) in factors.items():
        stem = name(layer)
        tensors |= {f"{stem}.{down_end}": down.contiguous(), f"{stem}.{up_end}": up.contiguous()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file({name: tensor.clone() for name, tensor in {**tensors, **more}.items()}, path)
    return path


def merged_by_hand(weights: Mapping[str, Tensor], factors: Factors, strength: float = 1.0) -> dict[str, Tensor]:
    merged = dict(weights)
    for layer, (down, up, alpha) in factors.items():
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        weight = merged[f"{layer}.weight"]
        merged[f"{layer}.weight"] = (weight.double() + scale * (up.double() @ down.double())).to(weight.dtype)
    return merged


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 16, 2, 4, 6, generator=generator), torch.tensor([700.0]), torch.randn(1, 512, 32)


INPUTS = inputs()


def start(model: StreamedWan, swap: int = 0, disk: bool = False) -> StreamedWan:
    ram = RAM_MARGIN_BYTES + 7 * model.largest_block_bytes // 2 if disk else None  # too little for 5 blocks
    plan = model.make_plan(WorkSize(5, 32, 48), Limits(UNLIMITED, ram_budget_bytes=ram, blocks_to_swap=swap))
    assert plan.from_disk == disk
    model.start(plan, DeviceRing(plan.ring_bytes, CPU) if swap else None)
    return model


@torch.inference_mode()
def velocity(path: Path, *loras: LoraChoice, settings: RunSettings = RunSettings()) -> Tensor:  # noqa: B008
    model = start(StreamedWan(path, settings, loras=loras))
    result = model(*INPUTS)
    model.release()
    assert all(parameter.is_meta for parameter in model.model.parameters())
    return result


def error_of(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors")


def save_merged(wan: Path, path: Path, factors: Factors, strength: float = 1.0) -> Path:
    save_file(merged_by_hand(load_file(wan), factors, strength), path)
    return path


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_naming_gives_what_merging_by_hand_gives(wan: Path, tmp_path: Path, dialect: str) -> None:
    factors = make_factors()
    lora = save_lora(tmp_path / "lora.safetensors", factors, dialect)
    model = StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora)])
    report = model.loras.loras[0].report
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
    report = model.loras.loras[0].report
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
    "LoKr": (lambda: {"lora_unet_blocks_0_ffn_0.lokr_w1": torch.zeros(2, 2)}, ["no LoRA", "lokr_w1"]),
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
    on_image = StreamedWan(i2v, RunSettings(), loras=[LoraChoice(lora)]).loras.loras[0].report
    text_model = save_wan(tmp_path / "t2v.safetensors")
    on_text = StreamedWan(text_model, RunSettings(), loras=[LoraChoice(lora)]).loras.loras[0].report
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
    source, block = model.source, model.model.blocks[0]

    def places() -> list[int]:
        layer = block.ffn[0]
        return [tensor.data_ptr() for tensor in (layer.weight, layer.lora_up, layer.lora_down, layer.lora_scale)]

    with torch.inference_mode():
        at_one, before = model(*INPUTS), places()
        model.set_lora_strengths([0.25])
        at_quarter = model(*INPUTS)
        assert places() == before and model.source is source
        model.set_lora_strengths([1.0])
        assert torch.equal(model(*INPUTS), at_one)
    model.release()
    assert torch.equal(at_quarter, velocity(wan, LoraChoice(lora, 0.25)))
    with pytest.raises(ValueError, match="2 strengths for 1 LoRAs"):
        model.set_lora_strengths([1.0, 2.0])


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
        assert torch.equal(project(x), out)
        assert torch.equal(project(x.view(3, 3, DIM)).view(9, DIM), out)


# --- what is merged --------------------------------------------------------------------------------------


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_differences_convolutions_and_dora_are_merged(
    wan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down, up, conv_down, conv_up = rand(1, 4, DIM), rand(2, DIM, 4), rand(3, 4, 16, 1, 2, 2), rand(4, DIM, 4, 1, 1, 1)
    rows, columns = rand(5, DIM, 1).abs() + 1, rand(6, 1, DIM).abs() + 1
    q, k = "blocks.0.self_attn.q", "blocks.1.cross_attn.k"
    more = {
        "diffusion_model.blocks.0.norm3.diff": rand(7, DIM),
        "diffusion_model.blocks.0.norm3.diff_b": rand(8, DIM),
        "diffusion_model.blocks.1.self_attn.norm_k.diff": rand(9, DIM),
        "diffusion_model.blocks.1.diff_m": rand(10, 1, 6, DIM),
        "diffusion_model.blocks.2.modulation.diff": rand(11, 1, 6, DIM),
        "diffusion_model.head.diff_m": rand(12, 1, 2, DIM),
        "diffusion_model.blocks.2.ffn.0.diff": rand(13, FFN, DIM),
        "diffusion_model.time_projection.1.diff_b": rand(14, 6 * DIM),
        "diffusion_model.patch_embedding.lora_down.weight": conv_down,
        "diffusion_model.patch_embedding.lora_up.weight": conv_up,
        f"diffusion_model.{q}.lora_A.weight": down,
        f"diffusion_model.{q}.lora_B.weight": up,
        f"diffusion_model.{q}.dora_scale": rows,
        f"diffusion_model.{k}.lora_A.weight": down,
        f"diffusion_model.{k}.lora_B.weight": up,
        f"diffusion_model.{k}.dora_scale": columns,
    }
    factors = make_factors(layers=["blocks.1.ffn.2"])
    lora = save_lora(tmp_path / "lora.safetensors", factors, "LightX2V", **more)
    strength, weights = 0.6, merged_by_hand(load_file(wan), factors, 0.6)
    tensors = {
        "blocks.0.norm3.weight": more["diffusion_model.blocks.0.norm3.diff"],
        "blocks.0.norm3.bias": more["diffusion_model.blocks.0.norm3.diff_b"],
        "blocks.1.self_attn.norm_k.weight": more["diffusion_model.blocks.1.self_attn.norm_k.diff"],
        "blocks.1.modulation": more["diffusion_model.blocks.1.diff_m"],
        "blocks.2.modulation": more["diffusion_model.blocks.2.modulation.diff"],
        "head.modulation": more["diffusion_model.head.diff_m"],
        "blocks.2.ffn.0.weight": more["diffusion_model.blocks.2.ffn.0.diff"],
        "time_projection.1.bias": more["diffusion_model.time_projection.1.diff_b"],
        "patch_embedding.weight": torch.einsum("or,rcthw->octhw", conv_up[..., 0, 0, 0], conv_down),
    }
    for name, difference in tensors.items():
        weights[name] = weights[name] + strength * difference
    for name, magnitude, dim in ((f"{q}.weight", rows, 1), (f"{k}.weight", columns, 0)):
        changed = weights[name] + up @ down
        changed = magnitude * changed / changed.norm(dim=dim, keepdim=True)
        weights[name] = weights[name] + strength * (changed - weights[name])
    save_file(weights, tmp_path / "hand.safetensors")
    with caplog.at_level(logging.INFO):
        got = velocity(wan, LoraChoice(lora, strength))
    want = velocity(tmp_path / "hand.safetensors")
    print(f"differences, a convolution, DoRA: relative error {error_of(got, want):.1e}")
    assert error_of(got, want) < 1e-5
    said = [record.getMessage() for record in caplog.records if "merged" in record.getMessage()]
    assert said == ["LoRA: 11 tensors are merged as they are read."]
    with pytest.raises(CheckpointError, match=r"can only be merged.*choose lora_mode auto"):
        StreamedWan(wan, RunSettings(lora_mode="side"), loras=[LoraChoice(lora)])


def test_decomposed_lengths() -> None:
    weight = rand(0, 5, 5)
    assert torch.allclose(decomposed(weight, torch.arange(1.0, 6.0)).norm(dim=1), torch.arange(1.0, 6.0))
    assert torch.allclose(decomposed(weight, torch.arange(1.0, 6.0)[None]).norm(dim=0), torch.arange(1.0, 6.0))


@pytest.mark.parametrize(("quantization", "per_row"), [("fp8", 0.04), ("int8", 0.012)])
def test_merged_8_bit_weights_get_fresh_scales(wan: Path, tmp_path: Path, quantization: str, per_row: float) -> None:
    factors = {layer: (down * 5, up * 5, alpha) for layer, (down, up, alpha) in make_factors(rank=16).items()}
    choice = LoraChoice(save_lora(tmp_path / "lora.safetensors", factors))
    settings = RunSettings(quantization=quantization, lora_mode="merge")
    model = start(StreamedWan(wan, settings, loras=[choice]))
    plain = start(StreamedWan(wan, replace(settings, lora_mode="auto")))
    layer, before = model.model.blocks[1].ffn[0], plain.model.blocks[1].ffn[0]
    assert "lora_down" not in layer._parameters and layer.weight.dtype == before.weight.dtype
    down, up, alpha = factors["blocks.1.ffn.0"]
    want = before.format.dequantize(before.packed(), torch.float32) + (alpha or 0) / 16 * up @ down
    got = layer.format.dequantize(layer.packed(), torch.float32)
    error = error_of(got, want)
    print(f"{quantization}: {error:.1e} of the dense sum; the largest scale grows by "
          f"{float(layer.weight_scale.max() / before.weight_scale.max()):.1f}")  # fmt: skip
    assert error < per_row
    assert (layer.weight_scale.max() > 1.5 * before.weight_scale.max()) and got.abs().max() > 1.5 * want.abs().mean()


def test_one_scale_stays_one_scale(tmp_path: Path) -> None:
    weight = rand(1, 64, 64)
    scale = weight.abs().max() / 448
    save_file({"layer.weight": (weight / scale).to(torch.float8_e4m3fn), "layer.scale_weight": scale,
               "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")  # fmt: skip
    difference = 4 * rand(2, 64, 64)
    save_file({"layer.diff": difference}, tmp_path / "lora.safetensors")
    checkpoint = plain_dialect(open_checkpoint(tmp_path / "fp8.safetensors"))
    lora = open_lora(tmp_path / "lora.safetensors", checkpoint.tensors, {"layer": "layer"})
    source = AttachedLoras(torch.nn.Module(), checkpoint, [lora], [1.0], torch.float32).source()

    def read(name: str) -> Tensor:
        raw = torch.empty(source.tensors[name].nbytes, dtype=torch.uint8)
        source.read_into(name, raw)
        return raw.view(source.tensors[name].dtype).view(source.tensors[name].shape)

    fresh = read("layer.weight_scale")  # before the weight: whichever comes first
    assert fresh.shape == scale.shape and fresh > 2 * scale
    error = error_of(read("layer.weight").float() * fresh, weight + difference)
    print(f"fp8 with one scale: {error:.1e}")
    assert error < 0.04


def test_packed_weights_take_no_merging(tmp_path: Path) -> None:
    path, _ = save_gguf(tmp_path / "wan.gguf", "Q4_K")
    down, up = torch.zeros(4, 256), torch.zeros(256, 4)
    save_file(
        {f"blocks.0.self_attn.q.{end}": t for end, t in zip(AB, (down, up), strict=True)}, tmp_path / "l.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.q\.weight must be merged.*into Q4_K; expected"):
        StreamedWan(path, RunSettings(lora_mode="merge"), loras=[LoraChoice(tmp_path / "l.safetensors")])
    with pytest.raises(ValueError, match="lora_mode is 'both'; expected one of auto, side, merge"):
        StreamedWan(path, RunSettings(lora_mode="both"))


# --- streaming -------------------------------------------------------------------------------------------


def test_a_loras_bytes_travel_with_their_blocks(tmp_path: Path) -> None:
    wan = save_wan(tmp_path / "wan.safetensors", num_layers=5)
    lora = LoraChoice(
        save_lora(tmp_path / "lora.safetensors", make_factors(rank=8, layers=[*LAYERS, "text_embedding.2"]))
    )
    resident = velocity(wan, lora)
    model, plain = StreamedWan(wan, RunSettings(), loras=[lora]), StreamedWan(wan, RunSettings())
    places = {place.name for place in model.layouts[0].places}
    assert {"self_attn.q.lora_down", "self_attn.q.lora_up", "ffn.2.lora_up"} <= places
    assert not any("lora_scale" in place for place in places)
    extra = model.layouts[0].nbytes - plain.layouts[0].nbytes
    assert extra == 4 * 8 * (8 * 2 * DIM + 2 * (DIM + FFN))
    assert model.footprint().fixed_bytes - plain.footprint().fixed_bytes == 4 * 8 * 2 * DIM
    # those of what makes keys and values of the prompt stay at home with it
    assert model.layouts[0].stream_bytes - plain.layouts[0].stream_bytes == extra - 4 * 8 * 4 * DIM
    with torch.inference_mode():
        for swap, disk in ((3, False), (5, True)):
            start(model, swap, disk)
            assert isinstance(model.source, DiskBlocks if disk else HostBlocks)
            assert torch.equal(model(*INPUTS), resident)
            model.release()


@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_large_tensors_that_are_in_no_file_stream_from_disk(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above 1 MiB tensors are read from a file in every pass: from a temporary one, deleted afterwards."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    config = replace(CONFIGS["t2v"], ffn_dim=4096, num_layers=5)
    wan = tmp_path / "wan.safetensors"
    save_file({name: t.contiguous() for name, t in randomize(WanModel(config)).state_dict().items()}, wan)
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(80, DIM, generator=generator), torch.randn(4096, 80, generator=generator) / 80, 80.0
    lora = LoraChoice(save_lora(tmp_path / "lora.safetensors", {f"blocks.{n}.ffn.0": pair for n in range(2)}))
    settings = RunSettings(lora_mode=mode)
    resident = velocity(wan, lora, settings=settings)
    with torch.inference_mode():
        model = start(StreamedWan(wan, settings, loras=[lora]), 5, disk=True)
        assert (
            len(list(folder.rglob("weights"))) == 1 and model.spool is not None and model.spool.num_bytes >= 2 * 2**20
        )
        assert torch.equal(model(*INPUTS), resident) and not torch.equal(resident, velocity(wan))
        model.release()
    assert not list(folder.iterdir())


def test_loras_beside_a_model_loaded_whole_do_nothing_to_it(wan: Path) -> None:
    with torch.inference_mode():
        assert torch.equal(load_wan(wan)(*INPUTS), velocity(wan))


# --- pipeline and command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("files"), experts=True)


def command(files: WanFiles, output: Path, *more: object) -> list[str]:
    words: list[object] = [
        "generate", "--model", files.model, "--text-encoder", files.text_encoder, "--vae", files.vae,
        "--prompt", "a red ball moves left", "--output", output, "--device", "cpu",
        "--width", 48, "--height", 32, "--frames", 5, "--steps", 2, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def test_the_command_line_applies_loras_to_both_experts(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"lora_te_text.alpha": torch.tensor(1.0)}
    high = save_lora(tmp_path / "high.safetensors", make_factors(0, 4), "musubi", **odd)
    low = save_lora(tmp_path / "low.safetensors", make_factors(1, 8), "diffusers")
    style = save_lora(tmp_path / "style.safetensors", make_factors(2, 4, LAYERS[:3]))

    def made(*more: object) -> tuple[bytes, str]:
        status = main(command(files, tmp_path / "v.mp4", *more, "--model-low", files.model_low))
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return (tmp_path / "v.mp4").read_bytes(), shown.out

    with_loras, text = made("--lora", f"{high}:0.5", "--lora", style, "--lora-low", f"{low}:1.0")
    print(text)
    assert "high.safetensors: 90 of 91 keys applied\n" in text and "style.safetensors: 9 of 9 keys applied" in text
    assert "low.safetensors: 90 of 90 keys applied" in text
    plain, _ = made()
    assert with_loras != plain
    assert made("--lora", f"{high}:0", "--lora-low", f"{low}:0")[0] == plain


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "nowhere.safetensors:0.5"], ["nowhere.safetensors: no such file"]),
        (["--lora", "a.safetensors:nan"], ["a.safetensors:nan", "style.safetensors:0.8"]),
        (["--lora-low", "a.safetensors"], ["a.safetensors: a LoRA for the low-noise expert, but there is only"]),
    ],
)
def test_wrong_loras_are_refused_in_one_line(
    files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]
) -> None:
    try:
        status: object = main(command(files, tmp_path / "v.mp4", *words))
    except SystemExit as stop:
        status = stop.code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    for part in said:
        assert part in line


def test_strengths_and_paths_with_colons(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", "m", "--text-encoder", "t", "--vae", "v", "--prompt", "p"]
    given = ["C:\\loras\\style.safetensors:0.8", "C:\\loras\\style.safetensors", "a.safetensors:-1"]
    options = make_parser().parse_args([*words, *(word for lora in given for word in ("--lora", lora))])
    assert [choice.strength for choice in options.lora] == [0.8, 1.0, -1.0]
    assert [str(choice.path) for choice in options.lora] == [given[1], given[1], "a.safetensors"]


def test_one_plan_holds_for_experts_with_different_loras(files: WanFiles, tmp_path: Path) -> None:
    low = save_lora(tmp_path / "low.safetensors", make_factors(1, 32))
    pipeline = WanPipeline(replace(files, loras_low=(LoraChoice(low),)))
    assert pipeline.low is not None
    assert pipeline.low.largest_block_bytes > pipeline.high.largest_block_bytes
    request = WanRequest("a red ball", width=48, height=32, num_frames=5, num_steps=2)
    assert sum(frames.shape[0] for frames in pipeline.generate(request)) == 5
    assert pipeline.plan is not None and pipeline.plan.model == "wan_low.safetensors"
