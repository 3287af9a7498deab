"""Every layout of LoRA files beside and merged into every kind of model file, against merging by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.kinds import file_kind
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.lora.file import LoraChoice
from safetensors.torch import save_file
from torch import Tensor

from .lora_layouts import LAYERS, LAYOUTS, SPELLINGS, Weights, relative_error
from .loras import start
from .quantizers import write_gguf
from .tiny import CONFIGS, randomize

FORMATS = {"bf16": 3e-3, "fp8": 0.05, "GGUF": 0.01}  # how far apart a weight and its stored form are
EXACT = 1e-5  # of what is only added up in fp32
LAYOUTS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "layouts.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A model of one block in each format."""
    folder = tmp_path_factory.mktemp("models")
    model = randomize(WanModel(replace(CONFIGS["t2v"], num_layers=1)))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "bf16.safetensors")
    cast = {n: t.to(torch.float8_e4m3fn) if n in linear and n.startswith("blocks") else t for n, t in tensors.items()}
    save_file(cast, folder / "fp8.safetensors")
    packed = {n: (t, "Q8_0" if n in linear and n.startswith("blocks") else "F32") for n, t in tensors.items()}
    write_gguf(folder / "GGUF.gguf", packed)
    return {path.stem: path for path in folder.iterdir()}


@torch.inference_mode()
def effective(model: StreamedWan) -> dict[str, Tensor]:
    """Every tensor of a started model as its forward pass uses it, fp32: of linear layers what they make of ones."""
    found = {name: tensor.float() for name, tensor in model.model.state_dict().items()}
    for name, layer in model.model.named_modules():
        if isinstance(layer, Linear):
            product = layer(torch.eye(layer.in_features))
            found[f"{name}.weight"] = (product - (0 if layer.bias is None else layer.bias.float())).T
    return found


@pytest.fixture(scope="module")
def stored(models: Mapping[str, Path]) -> Mapping[str, Weights]:
    """What each file holds, dequantised."""
    return {form: weights_of(path, RunSettings(dtype=torch.float32)) for form, path in models.items()}


def weights_of(path: Path, settings: RunSettings, *loras: LoraChoice) -> dict[str, Tensor]:
    model = start(StreamedWan(path, settings, loras=loras))
    found = {name: tensor.clone() for name, tensor in effective(model).items()}
    model.release()
    return found


@pytest.mark.parametrize("mode", ["side", "merge"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("title", LAYOUTS)
def test_a_layout_does_what_merging_by_hand_does(
    title: str, form: str, mode: str, models: Mapping[str, Path], stored: Mapping[str, Weights], tmp_path: Path
) -> None:
    """ "side" is the default, in which some layouts can only be merged."""
    layout, weights = LAYOUTS[title], stored[form]
    made = layout.make(weights)
    path = made.save(tmp_path)
    settings = RunSettings(dtype=torch.float32, lora_mode="auto" if mode == "side" else "merge")
    model = start(StreamedWan(models[form], settings, loras=[LoraChoice(path)]))
    report = model.weights.loras.loras[0].report
    assert (report.num_applied, report.num_keys) == (len(made.tensors), len(made.tensors)), str(report)
    got = effective(model)
    model.release()
    is_merged = mode == "merge" or layout.merged_only
    for name, weight in weights.items():
        want = made.changes.get(name, weight)
        beside = not is_merged and name.removesuffix(".weight") in LAYERS
        bound = EXACT if beside or name not in made.changes else FORMATS[form]
        error = relative_error(got[name], want)
        assert error < bound, f"{name}: {error:.1e}"
        assert name not in made.changes or relative_error(want, weight) > 1.5 * bound, "an effect that is not seen"


@pytest.mark.parametrize("title", [title for title in LAYOUTS if title not in SPELLINGS])
def test_half_a_strength_is_half_of_the_way(
    title: str, models: Mapping[str, Path], stored: Mapping[str, Weights], tmp_path: Path
) -> None:
    """What takes a tensor's place does so at any strength but 0, as in ComfyUI; each turn of a BOFT is half of it."""
    made = LAYOUTS[title].make(stored["bf16"])
    path, settings = made.save(tmp_path), RunSettings(dtype=torch.float32)
    half = weights_of(models["bf16"], settings, LoraChoice(path, 0.5))
    none = weights_of(models["bf16"], settings, LoraChoice(path, 0.0))
    for name, changed in made.changes.items():
        weight = stored["bf16"][name]
        assert torch.equal(none[name], weight), name
        want = changed if name in made.replaced else (weight + changed) / 2
        assert relative_error(half[name], want) < (0.05 if title == "BOFT" else FORMATS["bf16"]), name


@pytest.mark.parametrize("title", LAYOUTS)
def test_inspect_knows_every_layout(title: str, stored: Mapping[str, Weights], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(LAYOUTS[title].make(stored["bf16"]).save(tmp_path))
    kind = file_kind(checkpoint.tensors)
    assert kind.kind == "lora" and re.search("LoRA|LoHa|LoKr|OFT", kind.title), kind


def test_the_page_has_every_layout() -> None:
    """docs/layouts.md, section "LoRAs": a line of each, and no others."""
    page = LAYOUTS_PAGE.read_text(encoding="utf-8")
    section = page.partition("<!-- loras: tests/test_layouts_lora.py -->")[2].partition("<!-- end of loras -->")[0]
    assert section.strip().splitlines() == table()


def table() -> list[str]:
    """The section's lines."""
    lines = ["| layout | keys | written by | what we do |", "| --- | --- | --- | --- |"]
    for title, layout in LAYOUTS.items():
        keys = layout.keys if " " in layout.keys else f"`{layout.keys}`"
        does = "merged" if layout.merged_only else "beside or merged"
        lines.append(f"| {title} | {keys} | {layout.written_by} | {does} |")
    return lines


def test_a_lora_of_vace_in_diffusers_names(tmp_path: Path) -> None:
    config = replace(CONFIGS["t2v"], model_type="vace", num_layers=2, vace_layers=1, vace_channels=96)
    model = randomize(WanModel(config))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "vace.safetensors")
    names = {
        "vace_blocks.0.self_attn.q": "vace_blocks.0.attn1.to_q",
        "vace_blocks.0.before_proj": "vace_blocks.0.proj_in",
        "vace_blocks.0.after_proj": "vace_blocks.0.proj_out",
        "blocks.1.cross_attn.o": "blocks.1.attn2.to_out.0",
    }
    down, up = torch.randn(4, config.dim), torch.randn(config.dim, 4)
    ends = (("lora_A.weight", down), ("lora_B.weight", up))
    tensors = {f"transformer.{theirs}.{end}": tensor.clone() for theirs in names.values() for end, tensor in ends}
    save_file(tensors, tmp_path / "lora.safetensors")
    opened = StreamedWan(
        tmp_path / "vace.safetensors", RunSettings(), loras=[LoraChoice(tmp_path / "lora.safetensors")]
    )
    lora = opened.weights.loras.loras[0]
    assert lora.updates.keys() == names.keys() and lora.report.num_applied == lora.report.num_keys == 8
