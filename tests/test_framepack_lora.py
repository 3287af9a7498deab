"""LoRAs for FramePack and for HunyuanVideo: every naming, parts of layers, against diffusers and by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from lowvram_video.framepack.checkpoint import build_framepack, open_framepack
from lowvram_video.framepack.lora_names import framepack_aliases
from lowvram_video.weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from lowvram_video.weights.linear.quantize import quantize_checkpoint
from lowvram_video.weights.lora.attach import AttachedLoras
from lowvram_video.weights.lora.file import Lora, open_lora
from lowvram_video.weights.lora.low_rank import LowRankPair
from lowvram_video.weights.lora.update import decomposed
from safetensors.torch import save_file
from torch import Tensor

from .tiny_framepack import CONFIG, make_tensors, save_framepack

DIM, MLP = CONFIG.dim, CONFIG.mlp_dim
RANK, ALPHA = 4, 2.0
Tensors = dict[str, Tensor]

# Written out, not taken from the code under test: HunyuanVideo's layers, what they are here, and their rows.
QKV = ["attn.to_q", "attn.to_k", "attn.to_v"]
DOUBLE = {
    "img_attn_qkv": (QKV, [DIM] * 3),
    "img_attn_proj": (["attn.to_out.0"], [DIM]),
    "img_mlp.fc1": (["ff.net.0.proj"], [MLP]),
    "img_mlp.fc2": (["ff.net.2"], [DIM]),
    "img_mod.linear": (["norm1.linear"], [6 * DIM]),
    "txt_attn_qkv": (["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], [DIM] * 3),
    "txt_attn_proj": (["attn.to_add_out"], [DIM]),
    "txt_mlp.fc1": (["ff_context.net.0.proj"], [MLP]),
    "txt_mlp.fc2": (["ff_context.net.2"], [DIM]),
    "txt_mod.linear": (["norm1_context.linear"], [6 * DIM]),
}
SINGLE = {
    "linear1": ([*QKV, "proj_mlp"], [DIM, DIM, DIM, MLP]),
    "linear2": (["proj_out"], [DIM]),
    "modulation.linear": (["norm.linear"], [3 * DIM]),
}
COLUMNS = {"img_mlp.fc2": MLP, "txt_mlp.fc2": MLP, "linear2": DIM + MLP}
COMFYUI = {
    "img_attn_qkv": "img_attn.qkv", "img_attn_proj": "img_attn.proj", "img_mlp.fc1": "img_mlp.0",
    "img_mlp.fc2": "img_mlp.2", "img_mod.linear": "img_mod.lin", "txt_attn_qkv": "txt_attn.qkv",
    "txt_attn_proj": "txt_attn.proj", "txt_mlp.fc1": "txt_mlp.0", "txt_mlp.fc2": "txt_mlp.2",
    "txt_mod.linear": "txt_mod.lin", "linear1": "linear1", "linear2": "linear2", "modulation.linear": "modulation.lin",
}  # fmt: skip


def make_fused() -> dict[tuple[str, str, int], tuple[Tensor, Tensor]]:
    """(their blocks, their layer, block) -> down, up: random, for every layer of the blocks."""
    generator = torch.Generator().manual_seed(3)
    fused = {}
    for blocks, layers in (("double_blocks", DOUBLE), ("single_blocks", SINGLE)):
        for number in range(2):
            for name, (_, rows) in layers.items():
                down = torch.randn(RANK, COLUMNS.get(name, DIM), generator=generator) * 0.05
                fused[blocks, name, number] = down, torch.randn(sum(rows), RANK, generator=generator)
    return fused


def make_ours() -> dict[str, tuple[Tensor, Tensor]]:
    """The same by our layers."""
    ours = {}
    for (blocks, name, number), (down, up) in make_fused().items():
        stem, layers = (
            ("transformer_blocks", DOUBLE) if blocks == "double_blocks" else ("single_transformer_blocks", SINGLE)
        )
        names, rows = layers[name]
        for leaf, part in zip(names, up.split(rows), strict=True):
            ours[f"{stem}.{number}.{leaf}"] = down, part
    return ours


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# naming -> (from our layers?, a layer's stem, the factors' ends)
NAMINGS: dict[str, tuple[bool, Callable[[str], str], tuple[str, str]]] = {
    "musubi": (True, lambda layer: f"lora_unet_{layer.replace('.', '_')}", DOWN_UP),
    "diffusers": (True, lambda layer: f"transformer.{layer}", AB),
    "official": (True, lambda layer: layer, AB),
    "PEFT": (True, lambda layer: f"base_model.model.{layer}", AB),
    "HunyuanVideo": (False, lambda layer: f"diffusion_model.{layer}", AB),
    "HunyuanVideo, transformer.": (False, lambda layer: f"transformer.{layer}", AB),
    "HunyuanVideo, musubi": (False, lambda layer: f"lora_unet_{layer.replace('.', '_')}", DOWN_UP),
    "Tencent's I2V": (False, lambda layer: f"Hunyuan_video_I2V_lora_{layer.replace('.', '_')}", DOWN_UP),
    "HunyuanVideo in ComfyUI": (False, lambda layer: f"diffusion_model.{layer}", DOWN_UP),
}


def save_lora(path: Path, naming: str) -> Path:
    is_ours, stem, (down_end, up_end) = NAMINGS[naming]
    if is_ours:
        factors = make_ours()
    else:
        leaves = COMFYUI if "ComfyUI" in naming else {name: name for name in COMFYUI}
        factors = {f"{blocks}.{n}.{leaves[name]}": pair for (blocks, name, n), pair in make_fused().items()}
    tensors: Tensors = {}
    for layer, (down, up) in factors.items():
        tensors |= {f"{stem(layer)}.{down_end}": down, f"{stem(layer)}.{up_end}": up}
        tensors[f"{stem(layer)}.alpha"] = torch.tensor(ALPHA)
    return save(path, tensors)


def save(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_framepack(tmp_path_factory.mktemp("files") / "framepack.safetensors")


def open_on(model_file: Path, lora: Path) -> Lora:
    _, checkpoint = open_framepack(model_file)
    return open_lora(lora, checkpoint.tensors, framepack_aliases(checkpoint.tensors))


def merged(model_file: Path, lora: Path, strength: float = 1.0) -> Tensors:
    """All weights of the model with the LoRA merged into them."""
    config, checkpoint = open_framepack(model_file)
    attached = AttachedLoras(
        build_framepack(config, checkpoint), checkpoint, [open_on(model_file, lora)], [strength], torch.float32, "merge"
    )
    return read_all(attached)


def read_all(attached: AttachedLoras) -> Tensors:
    source, tensors = attached.source(), {}
    for name, info in source.tensors.items():
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        source.read_into(name, raw)
        tensors[name] = raw.view(info.dtype).view(info.shape)
    return tensors


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_update(naming: str, model_file: Path, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "lora.safetensors", naming)
    lora, want = open_on(model_file, path), make_ours()
    assert lora.report.num_applied == lora.report.num_keys and not lora.report.skipped
    assert lora.updates.keys() == want.keys() and not lora.changes
    read = lora.checkpoint.read
    for layer, (down, up) in want.items():
        pair = lora.updates[layer]
        assert isinstance(pair, LowRankPair)
        assert torch.equal(pair.down(read), down) and torch.equal(pair.up(read), up), layer
        assert (pair.rank, pair.scale) == (RANK, ALPHA / RANK)

    got, plain = merged(model_file, path, 0.7), make_tensors()
    largest_error = 0.0
    for name, weight in plain.items():
        layer = name.removesuffix(".weight")
        if layer not in want:
            assert torch.equal(got[name], weight), name
            continue
        down, up = want[layer]
        exact = weight.double() + 0.7 * ALPHA / RANK * (up.double() @ down.double())
        largest_error = max(largest_error, float((got[name] - exact).norm() / exact.norm()))
        assert float((exact - weight).norm() / exact.norm()) > 0.01
    print(f"{naming}: {len(want)} layers, {lora.report.summary}, merged: max relative error {largest_error:.1e}")
    assert largest_error < 1e-6


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8"])
def test_beside_the_weights_every_naming_is_the_same(quantization: str, model_file: Path, tmp_path: Path) -> None:
    config, stored = open_framepack(model_file)
    checkpoint = quantize_checkpoint(stored, quantization)
    results: list[Tensors] = []
    for naming in ("musubi", "diffusers", "HunyuanVideo"):
        path = save_lora(tmp_path / f"{naming}.safetensors", naming)
        lora = open_lora(path, checkpoint.tensors, framepack_aliases(checkpoint.tensors))
        model = build_framepack(config, checkpoint)
        results.append(read_all(AttachedLoras(model, checkpoint, [lora], [1.0], torch.float32)))
    first = results[0]
    assert sum(name.endswith("lora_up") for name in first) == len(make_ours())
    for other in results[1:]:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name].view(torch.uint8), first[name].view(torch.uint8)) for name in first)


# --- against diffusers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> dict[str, TensorInfo]:
    """The published model's names and shapes; diffusers' conversion of LoRAs knows no other size."""
    with torch.device("meta"):
        reference = HunyuanVideoFramepackTransformer3DModel(
            num_refiner_layers=2, image_proj_dim=1152, has_image_proj=True, has_clean_x_embedder=True
        )
    return {
        name: TensorInfo(name, torch.bfloat16, tuple(tensor.shape), Path("none"), 0, 2 * tensor.numel())
        for name, tensor in reference.state_dict().items()
    }


REAL_LAYERS = {  # rows, columns
    "double_blocks.19.img_attn_qkv": (9216, 3072), "double_blocks.19.img_attn_proj": (3072, 3072),
    "double_blocks.19.img_mlp.fc1": (12288, 3072), "double_blocks.19.img_mlp.fc2": (3072, 12288),
    "double_blocks.19.img_mod.linear": (18432, 3072), "double_blocks.0.txt_attn_qkv": (9216, 3072),
    "double_blocks.0.txt_attn_proj": (3072, 3072), "double_blocks.0.txt_mlp.fc1": (12288, 3072),
    "double_blocks.0.txt_mlp.fc2": (3072, 12288), "double_blocks.0.txt_mod.linear": (18432, 3072),
    "single_blocks.39.linear1": (21504, 3072), "single_blocks.39.linear2": (3072, 15360),
    "single_blocks.39.modulation.linear": (9216, 3072), "vector_in.in_layer": (3072, 768),
    "time_in.mlp.0": (3072, 256), "guidance_in.mlp.2": (3072, 3072), "final_layer.linear": (64, 3072),
    "txt_in.input_embedder": (3072, 4096), "txt_in.t_embedder.mlp.2": (3072, 3072),
    "txt_in.c_embedder.linear_1": (3072, 4096),
    "txt_in.individual_token_refiner.blocks.1.mlp.fc1": (12288, 3072),
    "txt_in.individual_token_refiner.blocks.1.self_attn_proj": (3072, 3072),
    "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1": (6144, 3072),
}  # fmt: skip


def test_a_hunyuanvideo_lora_is_split_as_diffusers_splits_it(released: dict[str, TensorInfo], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors: Tensors = {}
    for layer, (rows, columns) in REAL_LAYERS.items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    path = save(tmp_path / "lora.safetensors", tensors)
    lora = open_lora(path, released, framepack_aliases(released))
    want = _convert_hunyuan_video_lora_to_diffusers(tensors)
    layers = {name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in want if ".lora_A." in name}
    assert lora.updates.keys() == layers and not lora.report.skipped
    read = lora.checkpoint.read
    for layer, pair in lora.updates.items():
        assert isinstance(pair, LowRankPair)
        assert torch.equal(pair.down(read), want[f"transformer.{layer}.lora_A.weight"]), layer
        assert torch.equal(pair.up(read), want[f"transformer.{layer}.lora_B.weight"]), layer
    print(
        f"{len(REAL_LAYERS)} layers of HunyuanVideo are {len(layers)} of FramePack, all factors as diffusers has them"
    )


def test_weights_merged_in_hunyuanvideos_layout_are_ours(model_file: Path, tmp_path: Path) -> None:
    """What diffusers converts in models only: halves of the head that change places, a refiner's qkv."""
    generator = torch.Generator().manual_seed(6)
    refiner = "txt_in.individual_token_refiner.blocks.1"
    leaves = {"self_attn_qkv": 3, "self_attn_proj": 1, "adaLN_modulation.1": 2}
    plain = {f"{refiner}.{leaf}.weight": torch.zeros(count * DIM, DIM) for leaf, count in leaves.items()}
    plain |= {"final_layer.adaLN_modulation.1.weight": torch.zeros(2 * DIM, DIM)}
    plain |= {"img_in.proj.weight": torch.zeros(DIM, 16, 1, 2, 2)}
    lora: Tensors = {}
    for name, weight in plain.items():
        up, down = (torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 4), (4, weight[0].numel())))
        plain[name] = (up @ down).view(weight.shape)
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        lora |= {f"{stem}.lora_A.weight": down.view(4, *weight.shape[1:]), f"{stem}.lora_B.weight": up}
    want = convert_hunyuan_video_transformer_to_diffusers(dict(plain))
    got, base = merged(model_file, save(tmp_path / "lora.safetensors", lora)), make_tensors()
    changed = {name for name in base if not torch.equal(got[name], base[name])}
    assert changed == want.keys() and "norm_out.linear.weight" in changed
    error = max(float(((got[name] - base[name]) - want[name]).abs().max()) for name in changed)
    print(f"{len(changed)} weights, max error {error:.1e}")
    assert error < 1e-5


# --- parts of layers -------------------------------------------------------------------------------------


def test_differences_and_magnitudes_are_divided(model_file: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    stem, ours = "diffusion_model.single_blocks.1.linear1", "single_transformer_blocks.1"
    rows = [DIM, DIM, DIM, MLP]
    down, up = torch.randn(RANK, DIM, generator=generator) * 0.1, torch.randn(sum(rows), RANK, generator=generator)
    magnitude, bias = (torch.rand(sum(rows), generator=generator) + 0.5 for _ in range(2))
    weight = torch.randn(sum(rows), DIM, generator=generator)
    pair = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.diff_b": bias}
    dora = save(tmp_path / "dora.safetensors", {**pair, f"{stem}.dora_scale": magnitude[:, None]})
    whole = save(tmp_path / "whole.safetensors", {f"{stem}.diff": weight})
    base = make_tensors()
    names = [f"{ours}.{leaf}" for leaf in (*QKV, "proj_mlp")]
    fused = torch.cat([base[f"{name}.weight"] for name in names])
    of_dora = decomposed(fused + up @ down, magnitude[:, None]).split(rows)
    got, with_difference = merged(model_file, dora), merged(model_file, whole)
    for name, want, more, shift in zip(names, of_dora, weight.split(rows), bias.split(rows), strict=True):
        torch.testing.assert_close(got[f"{name}.weight"], want)
        torch.testing.assert_close(got[f"{name}.bias"], base[f"{name}.bias"] + shift)
        torch.testing.assert_close(with_difference[f"{name}.weight"], base[f"{name}.weight"] + more)

    by_input = {**pair, f"{stem}.dora_scale": torch.ones(1, DIM)}
    report = open_on(model_file, save(tmp_path / "input.safetensors", by_input)).report
    assert "neither one per output nor one per input" in str(report)
    assert report.num_applied == 1  # the bias


def test_a_layer_that_is_there_twice_is_taken_once(model_file: Path, tmp_path: Path) -> None:
    down, up = torch.ones(1, DIM), torch.ones(DIM, 1)
    keys = {"transformer_blocks.0.attn.to_k.lora_A.weight": down, "transformer_blocks.0.attn.to_k.lora_B.weight": up}
    keys |= {"double_blocks.0.img_attn_qkv.lora_A.weight": down}
    keys |= {"double_blocks.0.img_attn_qkv.lora_B.weight": torch.ones(3 * DIM, 1)}
    lora = open_on(model_file, save(tmp_path / "lora.safetensors", keys))
    print(lora.report)
    assert len(lora.updates) == 3 and len(lora.report.skipped) == 2  # the first in the file
    assert "double_blocks.0.img_attn_qkv.lora_A.weight is the same" in str(lora.report)


def test_a_lora_of_another_size_is_refused(model_file: Path, tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    for rows, columns in ((3 * DIM + 3, DIM), (3 * DIM, DIM + 1), (DIM, DIM)):
        keys = {f"{stem}.lora_down.weight": torch.ones(2, columns), f"{stem}.lora_up.weight": torch.ones(rows, 2)}
        with pytest.raises(CheckpointError) as refusal:
            open_on(model_file, save(tmp_path / "lora.safetensors", keys))
        print(refusal.value)
        for words in (
            "a LoRA of another model: 3 of its layers differ",
            f"{columns} to {rows} features",
            "has 32 to 96",
        ):
            assert words in str(refusal.value)


def test_every_alias_is_of_a_layer_that_exists(released: dict[str, TensorInfo]) -> None:
    checkpoint = Checkpoint(Path("none"), released, {})
    aliases = framepack_aliases(checkpoint.tensors)
    parts = [alias for alias in aliases.values() if not isinstance(alias, str)]
    for alias in parts:
        rows = sorted((rows.start, rows.stop) for part in alias for rows in part.rows)
        assert rows[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(rows))
        for part in alias:
            assert sum(map(len, part.rows)) == released[f"{part.layer}.weight"].shape[0]
    fused = {alias for name, alias in aliases.items() if name.endswith("linear1")}
    assert len(fused) == 40 and all(max(rows.stop for p in alias for rows in p.rows) == 21504 for alias in fused)
