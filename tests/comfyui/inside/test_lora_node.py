"""Load LoRA (Low VRAM): ComfyUI's own loader where both know a file, and the files that only ours knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from lowvram_pack.nodes.loaders import LoadFramePackModel
from lowvram_pack.nodes.lora import LoadLora
from lowvram_pack.weights.files.checkpoint import Checkpoint
from lowvram_pack.weights.lora.fingerprint import lora_fingerprint
from safetensors.torch import load_file, save_file
from test_framepack import CONFIG, randn, run
from test_framepack import save as save_framepack
from test_native_nodes import lora as wan_lora
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

import nodes

DIM, MLP, RANK = CONFIG.dim, 4 * CONFIG.dim, 4
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    yield
    mm.unload_all_models()


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(folder))
    return folder


@pytest.fixture(scope="module")
def framepack(models: Path) -> Any:
    return LoadFramePackModel.execute(save_framepack(models), "auto", "fp32", "sdpa", "none").result[0]


def native(model: Any, name: str, strength: float = 1.0) -> Any:
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def loaded(model: Any, name: str, strength: float = 1.0) -> Any:
    return LoadLora.execute(model, name, strength).result[0]


def shown(model: Any, name: str) -> str:
    """What the node says."""
    (text,) = LoadLora.execute(model, name, 1.0).ui.as_dict()["text"]
    return str(text)


def framepack_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> down, up; the projections of a block share their down, as in a file that has them in one."""
    double, single = "transformer_blocks.1", "single_transformer_blocks.0"
    downs = [randn(RANK, DIM, seed=seed) * 0.2 for seed in range(2)]
    pairs = {f"{double}.{layer}": (downs[0], randn(DIM, RANK, seed=10 + n) * 0.2) for n, layer in enumerate(QKV)}
    pairs |= {f"{single}.{layer}": (downs[1], randn(DIM, RANK, seed=20 + n) * 0.2) for n, layer in enumerate(QKV)}
    pairs[f"{single}.proj_mlp"] = downs[1], randn(MLP, RANK, seed=30) * 0.2
    return pairs


def save_split(path: Path, prefix: str = "transformer.", alpha: float | None = None) -> str:
    """diffusers' names."""
    tensors = {}
    for layer, (down, up) in framepack_pairs().items():
        tensors |= {f"{prefix}{layer}.lora_A.weight": down.clone(), f"{prefix}{layer}.lora_B.weight": up}
        if alpha is not None:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path.name


def save_fused(path: Path) -> str:
    """HunyuanVideo's own names, with several layers in one."""
    pairs, tensors = framepack_pairs(), {}
    for theirs, prefix, layers in (
        ("double_blocks.1.img_attn_qkv", "transformer_blocks.1", QKV),
        ("single_blocks.0.linear1", "single_transformer_blocks.0", (*QKV, "proj_mlp")),
    ):
        down = pairs[f"{prefix}.{layers[0]}"][0]
        up = torch.cat([pairs[f"{prefix}.{layer}"][1] for layer in layers])
        tensors |= {f"diffusion_model.{theirs}.lora_A.weight": down, f"diffusion_model.{theirs}.lora_B.weight": up}
    save_file(tensors, path)
    return path.name


def test_framepack_as_by_the_native_loader(framepack: Any, loras: Path) -> None:
    plain = run(framepack)
    for alpha in (None, 3.0):
        name = save_split(loras / f"split_{alpha}.safetensors", alpha=alpha)
        want = run(native(framepack, name, 0.8))
        assert torch.equal(run(loaded(framepack, name, 0.8)), want)
        print(f"LoRA in diffusers' format, alpha {alpha}: effect {relative_error(want, plain):.2e}, as by Load LoRA")
        assert relative_error(want, plain) > 1e-2
    assert torch.equal(run(framepack), plain), "the model without it is as it was"
    assert torch.equal(run(loaded(framepack, name, 0.0)), plain)


@pytest.mark.parametrize("with_difference", [False, True])
def test_wan_as_by_the_native_loader(models: Path, loras: Path, with_difference: bool) -> None:
    tensors = {name: tensor for name, tensor in wan_lora().items() if with_difference or not name.endswith("diff_b")}
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(3.0) for name in tensors if "lora_A" in name}
    save_file(tensors | alphas, loras / "wan.safetensors")
    path, inputs = save(models, "t2v"), (*prompts(), empty_latent())
    model = ours(path)
    got, want = (sample(load(model, "wan.safetensors", 0.7), *inputs) for load in (loaded, native))
    assert torch.equal(got, want)
    error = relative_error(got, sample(native(core(path), "wan.safetensors", 0.7), *inputs))
    print(f"Wan, differences {with_difference}: as by Load LoRA; relative error to core's model {error:.2e}")
    assert error < 1e-3


@pytest.mark.parametrize("shape", [(64, 1), (1, 64)], ids=["rows", "columns"])
def test_dora_of_square_layers_as_by_the_native_loader(models: Path, loras: Path, shape: tuple[int, int]) -> None:
    path, layer = save(models, "t2v"), "diffusion_model.blocks.0.self_attn.q"
    dim = load_file(path)["blocks.0.self_attn.q.weight"].shape[0]
    tensors = {
        f"{layer}.lora_A.weight": randn(4, dim, seed=1),
        f"{layer}.lora_B.weight": randn(dim, 4, seed=2),
        f"{layer}.dora_scale": randn(*(dim if size > 1 else 1 for size in shape), seed=3).abs() + 1,
    }
    save_file(tensors, loras / "dora.safetensors")
    inputs = (*prompts(), empty_latent())
    model = ours(path)
    got, want = (sample(load(model, "dora.safetensors"), *inputs) for load in (loaded, native))
    assert relative_error(got, want) < 1e-5 and relative_error(got, sample(model, *inputs)) > 1e-3


def test_a_fused_file_is_its_split_version(framepack: Any, loras: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fused, split = save_fused(loras / "fused.safetensors"), save_split(loras / "split.safetensors")
    want = run(loaded(framepack, split))
    assert torch.equal(run(loaded(framepack, fused)), want)
    assert "4 of 4 keys applied" in caplog.text and "fused.safetensors: 4 of 4 keys applied" in shown(framepack, fused)
    plain = run(framepack)
    assert torch.equal(run(native(framepack, fused)), plain), "ComfyUI's loader finds no place for these names"
    print(f"fused LoRA: equals its split version; effect {relative_error(want, plain):.2e}")


def test_it_combines_with_native_loras(framepack: Any, loras: Path) -> None:
    fused, split = save_fused(loras / "fused.safetensors"), save_split(loras / "split.safetensors")
    both = run(loaded(native(framepack, split, 0.5), fused, 0.25))
    assert torch.equal(both, run(native(loaded(framepack, split, 0.5), split, 0.25)))
    assert relative_error(both, run(loaded(framepack, split, 0.75))) < 1e-4


def test_another_strength_reads_nothing(framepack: Any, loras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save_fused(loras / "fused.safetensors")
    weak = run(loaded(framepack, name, 0.25))
    read: list[str] = []
    read_into = Checkpoint.read_into

    def counting(self: Checkpoint, key: str, out: Tensor) -> None:
        read.append(key)
        read_into(self, key, out)

    monkeypatch.setattr(Checkpoint, "read_into", counting)
    stronger = loaded(framepack, name)
    assert read == [], "the file's tensors are at hand while the model has them"
    attached = framepack.engine.streamed.weights.loras
    strong = run(stronger)
    assert framepack.engine.streamed.weights.loras is attached and attached.strengths[0] == 1.0
    assert relative_error(weak, strong) > 1e-3
    monkeypatch.undo()
    save_split(loras / name)  # another file of that name
    assert "14 of 14 keys" in shown(framepack, name)


def test_what_has_no_place_is_said(framepack: Any, loras: Path) -> None:
    tensors = load_file(loras / save_split(loras / "split.safetensors"))
    save_file(tensors | {"lora_te1_text.lora_A.weight": torch.zeros(2, 2)}, loras / "more.safetensors")
    text = shown(framepack, "more.safetensors")
    assert "14 of 15 keys applied" in text and "lora_te1_text" in text


def test_wrong_files_and_models_are_refused(framepack: Any, models: Path, loras: Path) -> None:
    save_file(wan_lora(), loras / "wan.safetensors")
    with pytest.raises(ValueError, match="a LoRA of another model"):
        LoadLora.execute(framepack, "wan.safetensors", 1.0)
    with pytest.raises(ValueError, match="no LoRA"):
        save_file({"weight": torch.zeros(2, 2)}, loras / "none.safetensors")
        LoadLora.execute(framepack, "none.safetensors", 1.0)
    with pytest.raises(ValueError, match="models/loras"):
        LoadLora.execute(framepack, "absent.safetensors", 1.0)
    with pytest.raises(ValueError, match="Load FramePack Model"):
        LoadLora.execute(core(save(models, "t2v")), "wan.safetensors", 1.0)


def test_lokr_of_simpletuner_is_its_product_added_to_the_weights(models: Path, loras: Path) -> None:
    """LyCORIS's names, in diffusers' order: `lycoris_blocks_0_attn1_to_q`, with both factors whole."""
    base = save(models, "t2v")
    plain = load_file(base)
    names = {"self_attn.q": "attn1_to_q", "self_attn.o": "attn1_to_out_0", "cross_attn.v": "attn2_to_v"}
    kronecker, merged = {}, dict(plain)
    for ours_name, theirs in names.items():
        weight = f"blocks.0.{ours_name}.weight"
        rows, columns = plain[weight].shape
        first, second = randn(4, 4, seed=1) * 0.2, randn(rows // 4, columns // 4, seed=2) * 0.2
        stem = f"lycoris_blocks_0_{theirs}"
        kronecker |= {f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second, f"{stem}.alpha": torch.tensor(1.0)}
        merged[weight] = plain[weight] + torch.kron(first, second)
    save_file(kronecker, loras / "simpletuner.safetensors")
    whole = base.with_name("t2v_merged_lokr.safetensors")
    save_file(merged, whole)

    def made(model: Any) -> Tensor:
        return sample(model, *prompts(), empty_latent())

    want = made(ours(whole))
    assert relative_error(made(loaded(ours(base), "simpletuner.safetensors")), want) < 1e-4
    assert relative_error(made(ours(base)), want) > 1e-3


def test_a_lora_that_widens_the_first_layer_is_named_before_the_run(models: Path, loras: Path) -> None:
    """Control LoRAs: 32 channels for `patch_embedding`, by core's `reshape_weight`."""
    base = save(models, "t2v")
    dim = load_file(base)["patch_embedding.weight"].shape[0]
    stem = "diffusion_model.patch_embedding"
    save_file(
        {
            f"{stem}.lora_A.weight": randn(4, 32, 1, 2, 2, seed=1) * 0.1,
            f"{stem}.lora_B.weight": randn(dim, 4, 1, 1, 1, seed=2) * 0.1,
            f"{stem}.reshape_weight": torch.tensor([dim, 32, 1, 2, 2]),
        },
        loras / "control.safetensors",
    )
    with pytest.raises(ValueError, match="patch_embedding"):
        sample(native(ours(base), "control.safetensors"), *prompts(), empty_latent())


def test_a_configuration_beside_it_is_a_change(loras: Path) -> None:
    folder = loras / "peft"
    folder.mkdir()
    save_file({"a.lora_A.weight": torch.ones(2, 2), "a.lora_B.weight": torch.ones(2, 2)}, folder / "l.safetensors")
    name = str(Path("peft") / "l.safetensors")
    stamps = [LoadLora.fingerprint_inputs(name, 1.0)]
    for alpha in (8, 16):
        (folder / "adapter_config.json").write_text(f'{{"r": 2, "lora_alpha": {alpha}}}')
        stamps.append(LoadLora.fingerprint_inputs(name, 1.0))
    assert len(set(stamps)) == 3 and lora_fingerprint(folder / "l.safetensors") in stamps[-1]
