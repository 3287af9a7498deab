"""Core's LoRA loaders on every weight format: as on the command line, and free to change strength."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import gguf
import pytest
import torch
from lowvram_pack.memory.plan.footprint import Limits, WorkSize
from lowvram_pack.memory.plan.host_memory import RAM_MARGIN_BYTES
from lowvram_pack.nodes.block_swap import BlockSwap
from lowvram_pack.nodes.bridge.patches import patched_source
from lowvram_pack.nodes.demo import LoadDemo
from lowvram_pack.nodes.loaders import LoadWanModel
from lowvram_pack.runtime.settings import RunSettings
from lowvram_pack.wanvideo.network.model import Extras
from lowvram_pack.wanvideo.streamed import StreamedWan
from lowvram_pack.weights.files.checkpoint import Checkpoint, TensorInfo
from lowvram_pack.weights.lora.file import LoraChoice
from safetensors.torch import load_file, save_file
from test_native_nodes import lora
from tiny_models import core, empty_latent, ours, prompts, relative_error, sample, save
from torch import Tensor

import nodes

PLAIN = {name: tensor for name, tensor in lora().items() if not name.endswith("diff_b")}
FORMATS = ("fp32", "fp8", "int8", "Q8_0")
UNLIMITED = Limits(1 << 60)


def save_gguf(folder: Path) -> Path:
    """The tiny T2V model with its blocks' matrices in Q8_0."""
    path = folder / "t2v_q8_0.gguf"
    if path.exists():
        return path
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in load_file(save(folder, "t2v")).items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(models: Path, form: str) -> tuple[Path, str]:
    """A file, and the loader's `quantization`."""
    return (save_gguf(models), "none") if form == "Q8_0" else (save(models, "t2v"), form.replace("fp32", "none"))


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    mm.unload_all_models()
    yield
    mm.unload_all_models()


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(folder))
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(3.0) for name in PLAIN if "lora_A" in name}
    save_file(PLAIN | alphas, folder / "plain.safetensors")
    save_file(lora(), folder / "with_difference.safetensors")
    return folder / "plain.safetensors"


def loaded(model: Any, strength: float, name: str = "plain.safetensors") -> Any:
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def loha(model: Any, layer: str = "blocks.0.self_attn.q", strength: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(4)
    key = f"diffusion_model.{layer}"
    tensors = {
        f"{key}.hada_w{n}_{side}": 0.2 * torch.randn((256, 2) if side == "a" else (2, 256), generator=generator)
        for n in (1, 2)
        for side in "ab"
    }
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def test_gguf_files_are_listed(models: Path) -> None:
    path = save_gguf(models)
    (models / "notes.txt").write_text("no model")
    inputs = {given.id: given for given in LoadWanModel.GET_SCHEMA().inputs}
    assert path.name in inputs["model_name"].options
    assert "notes.txt" not in inputs["model_name"].options
    assert inputs["quantization"].options == ["none", "fp8", "fp8_fast", "int8", "4bit_fast", "auto_fast"]
    assert (
        relative_error(*(sample(ours(each), *prompts(), empty_latent()) for each in (path, save(models, "t2v")))) < 0.02
    )


@pytest.mark.parametrize("form", FORMATS)
def test_the_native_loader_does_what_the_command_line_does(models: Path, lora_file: Path, form: str) -> None:
    path, quantization = stored(models, form)
    generator = torch.Generator().manual_seed(2)
    latent, text = torch.randn(1, 16, 3, 8, 12, generator=generator), torch.randn(1, 512, 4096, generator=generator)
    settings = RunSettings(dtype=torch.float32, attention_mode="sdpa", quantization=quantization)
    direct = StreamedWan(path, settings, loras=[LoraChoice(lora_file, 0.8)])
    direct.start(direct.make_plan(WorkSize(9, 64, 96), UNLIMITED))
    wanted = direct(latent, torch.tensor([700.0]), text)
    model = loaded(ours(path, quantization=quantization), 0.8)
    mm.load_models_gpu([model])
    got = model.engine.run(latent, torch.tensor([700.0]), text, None, Extras())
    assert model.engine.streamed.weights.loras.loras
    error = relative_error(got, wanted)
    print(f"native LoRA loader and command line, {form}: relative error {error:.2e}")
    assert error < 1e-6


@pytest.mark.parametrize("form", FORMATS)
def test_strength_0_and_removal_are_exact(models: Path, lora_file: Path, form: str) -> None:
    path, quantization = stored(models, form)
    model = ours(path, quantization=quantization)
    plain = sample(model, *prompts(), empty_latent())
    tensors = load_file(lora_file)
    at_zero = comfy.sd.load_lora_for_models(model, None, tensors, 0.0, 0)[0]
    assert torch.equal(sample(at_zero, *prompts(), empty_latent()), plain)
    changed = sample(comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)[0], *prompts(), empty_latent())
    exact = sample(loaded(core(save(models, "t2v")), 1.0), *prompts(), empty_latent())
    error, effect = relative_error(changed, exact), relative_error(plain, exact)
    print(f"LoRA on {form}: effect {effect:.2e}, to core's fp32 {error:.2e}")
    assert error < 0.2 * effect
    assert torch.equal(sample(model, *prompts(), empty_latent()), plain)


def test_another_strength_reads_nothing(models: Path, lora_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(save_gguf(models))
    loader = nodes.LoraLoaderModelOnly()  # ComfyUI keeps a node's instance, and it its file
    weak = sample(loader.load_lora_model_only(model, lora_file.name, 0.25)[0], *prompts(), empty_latent())
    read: list[str] = []
    read_into = Checkpoint.read_into

    def counting(self: Checkpoint, name: str, out: Tensor) -> None:
        read.append(name)
        read_into(self, name, out)

    monkeypatch.setattr(Checkpoint, "read_into", counting)
    streamer = model.engine.streamed.streamer
    strong = sample(loader.load_lora_model_only(model, lora_file.name, 1.0)[0], *prompts(), empty_latent())
    assert read == []
    assert model.engine.streamed.streamer is streamer
    other = ours(save_gguf(models))
    assert torch.equal(sample(loaded(other, 1.0), *prompts(), empty_latent()), strong)
    assert relative_error(weak, strong) > 1e-2


def test_two_loras_and_a_difference(models: Path, lora_file: Path) -> None:
    path = save(models, "t2v")
    results = []
    for model in (ours(path), core(path)):
        both = loaded(loaded(model, 0.5), -0.7, "with_difference.safetensors")
        results.append(sample(both, *prompts(), empty_latent()))
    error = relative_error(*results)
    print(f"two LoRAs, one with a difference: relative error to core's {error:.2e}")
    assert error < 1e-3


def test_what_is_no_plain_lora_is_merged_and_said_once(
    models: Path, lora_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(models, "t2v")
    caplog.set_level("INFO")
    got = sample(loha(loaded(ours(path), 0.8)), *prompts(), empty_latent())
    assert caplog.text.count("1 weights have patches that can only be merged") == 1
    error = relative_error(got, sample(loha(loaded(core(path), 0.8)), *prompts(), empty_latent()))
    print(f"LoRA and LoHa: relative error to core's {error:.2e}")
    assert error < 1e-3


def test_a_lora_in_bypass_mode_is_refused_in_one_line(models: Path, lora_file: Path) -> None:
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass mode")
    model = ours(save(models, "t2v"))
    tensors = comfy.utils.load_torch_file(str(lora_file))
    with pytest.raises(ValueError, match=r"bypass mode .* Load LoRA"):
        comfy.sd.load_bypass_lora_for_models(model, None, tensors, 1.0, 0.0)


def test_loha_on_gguf_is_merged_as_q8_0(models: Path) -> None:
    model, inputs = ours(save_gguf(models)), (*prompts(), empty_latent())
    plain = sample(model, *inputs)
    got, want = (sample(loha(each, strength=30.0), *inputs) for each in (model, core(save(models, "t2v"))))
    error = relative_error(got, want)
    print(f"LoHa merged into Q8_0: relative error {error:.1e} to core's; effect {relative_error(want, plain):.1e}")
    assert error < 0.01 and error < 0.2 * relative_error(want, plain)
    assert torch.equal(sample(model, *inputs), plain)


def test_what_takes_no_merging_is_refused_in_one_line(tmp_path: Path) -> None:
    name = "blocks.0.self_attn.q.weight"
    info = TensorInfo(name, torch.uint8, (8, 8), tmp_path / "w.safetensors", 0, 64, "nvfp4", (8, 16))
    checkpoint = Checkpoint(info.file, {name: info}, {})
    with pytest.raises(ValueError, match=r"stores blocks\.0\.self_attn\.q\.weight as nvfp4.*use a plain LoRA") as error:
        patch = (1.0, ("diff", (torch.zeros(8, 16),)), 1.0, None, None)
        patched_source(checkpoint, {f"diffusion_model.{name}": [patch]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layer", "shapes", "said"),
    [
        ("self_attn.q", {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}, "64 to 64 features, the model has"),
        ("self_attn.q", {"diff": (64, 64)}, r"\[64, 64\], the model has \[256, 256\]"),
        ("self_attn.q", {"set_weight": (64, 64)}, r"\[64, 64\], the model has"),
        ("self_attn.q", {"lokr_w1": (4, 4), "lokr_w2": (16, 16)}, r"\[64, 64\], the model has"),
        ("self_attn.q", {"oft_blocks": (4, 16, 16)}, r"\[64\], the model has \[256\]"),
    ],
)
def test_patches_that_do_not_fit_are_named_before_the_run(
    models: Path, layer: str, shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    model = ours(save(models, "t2v"))
    key = f"diffusion_model.blocks.0.{layer}"
    tensors = {f"{key}.{end}": torch.zeros(shape) for end, shape in shapes.items()}
    wrong = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)[0]
    with pytest.raises(ValueError, match=rf"a LoRA of another model: 1 of its layers differ in size.*{said}") as error:
        sample(wrong, *prompts(), empty_latent())
    assert "\n" not in str(error.value)
    assert sample(model, *prompts(), empty_latent()).isfinite().all()


def test_single_patches_that_do_not_fit_are_left_out_as_core_does(
    models: Path, lora_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An I2V LoRA on a T2V model: only its patch embedding is of another size."""
    path, key = save(models, "t2v"), "diffusion_model.patch_embedding"
    tensors = comfy.utils.load_torch_file(str(lora_file))
    tensors |= {f"{key}.lora_A.weight": torch.ones(4, 36, 1, 2, 2), f"{key}.lora_B.weight": torch.ones(256, 4, 1, 1, 1)}
    results = [
        sample(comfy.sd.load_lora_for_models(model, None, tensors, 0.8, 0)[0], *prompts(), empty_latent())
        for model in (ours(path), core(path))
    ]
    assert relative_error(*results) < 1e-3
    assert "1 weights keep no LoRA, whose sizes differ: patch_embedding.weight: 144 to 256 features" in caplog.text


@pytest.mark.parametrize("form", ["fp32", "Q8_0"])
def test_loras_stream_from_the_disk(models: Path, lora_file: Path, form: str) -> None:
    model = ours(stored(models, form)[0])
    inputs = (*prompts(), empty_latent())
    wanted = sample(loaded(model, 0.8), *inputs)
    some = RAM_MARGIN_BYTES + 7 * model.engine.streamed.weights.largest_block_bytes // 2  # too little for 4 blocks
    swap = {"blocks_to_swap": -1, "vram_budget_gb": 0.0, "prefetch": 0, "pinned_memory": True}
    streamed = BlockSwap.execute(model, ram_budget_gb=some / 2**30, **swap).result[0]
    got = sample(loaded(streamed, 0.8), *inputs)
    assert streamed.engine.streamed.plan.host.from_disk
    assert torch.equal(got, wanted)
    if form == "fp32":
        got = sample(loha(streamed), *inputs)
        assert streamed.engine.streamed.plan.host.from_disk
        assert torch.equal(got, sample(loha(model), *inputs))


def test_a_two_expert_4_step_graph(models: Path, lora_file: Path) -> None:
    """Wan 2.2 with lightning LoRAs: two loaders, a LoRA on each, high noise first."""
    paths = save(models, "t2v"), save(models, "t2v", seed=1)
    results = []
    for load in (ours, core):
        positive, negative = prompts()
        latent = empty_latent()
        for path, strength, (first, last) in zip(paths, (1.0, 0.6), ((0, 2), (2, 10)), strict=True):
            (latent,) = nodes.KSamplerAdvanced().sample(
                loaded(load(path), strength), "enable" if first == 0 else "disable", 3, 4, 1.0, "euler", "simple",
                positive, negative, latent, first, last, "enable" if first == 0 else "disable",
            )  # fmt: skip
        results.append(latent["samples"])
    error = relative_error(*results)
    print(f"two experts with LoRAs: relative error {error:.2e}")
    assert error < 1e-3


def test_lora_on_the_demo_model() -> None:
    """At half strength it lies between none and all of it."""
    model, clip, _ = LoadDemo.execute().result
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red ball", ""))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(4):
        key = f"diffusion_model.blocks.{block}.ffn.2"
        tensors[f"{key}.lora_A.weight"] = torch.randn(8, 768, generator=generator) / 768**0.5
        tensors[f"{key}.lora_B.weight"] = 0.2 * torch.randn(256, 8, generator=generator)
    latent = empty_latent(size=(3, 12, 12))
    changes = []
    plain = sample(model, positive, negative, latent)
    for strength in (0.5, 1.0):
        patched = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]
        changes.append(relative_error(sample(patched, positive, negative, latent), plain))
    print(f"LoRA on the demo model: effects {changes}")
    assert 0 < changes[0] < changes[1]
    assert torch.equal(sample(model, positive, negative, latent), plain)


def test_a_lora_that_failed_to_attach_is_attached_by_the_next_run(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ours(save(models, "t2v"))
    plain = sample(model, *prompts(), empty_latent(), steps=1)
    with_lora = comfy.sd.load_lora_for_models(model, None, PLAIN, 0.8, 0)[0]
    expected = sample(with_lora, *prompts(), empty_latent(), steps=1)

    def broken(*arguments: Any) -> None:
        raise OSError("the disk is gone")

    for wanted, other in ((with_lora, model), (model, with_lora)):  # on, and off
        sample(other, *prompts(), empty_latent(), steps=1)
        with monkeypatch.context() as patch:
            patch.setattr(type(model.engine.streamed), "attach_loras", broken)
            with pytest.raises(OSError, match="disk is gone"):
                sample(wanted, *prompts(), empty_latent(), steps=1)
        got = sample(wanted, *prompts(), empty_latent(), steps=1)
        assert torch.equal(got, expected if wanted is with_lora else plain)
